"""Weights of others: what the reference implementations compute, we compute; what they wrote, we give back.

The models are random and small; their classes, settings and names on disk are those of Stable Diffusion.
"""

from __future__ import annotations

import functools
import gc
import json
import pickle
import random
import resource
import shutil
import sys
import time
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders import single_file_utils as reference
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import ldm
from ldm.autoencoder import Autoencoder
from ldm.cli import main
from ldm.convert import convert, export_diffusers
from ldm.convert.names import COMPVIS, DIFFUSERS, naming
from ldm.convert.tensors import open_pickle
from ldm.loading import read
from ldm.pipeline import LatentDiffusion
from ldm.text import clip_vocabulary
from ldm.unet import UNet
from tests.conftest import tiny_model

PROMPTS = ["a photo of a cat", "", "Ein Äpfelchen, 林檎 🍎!", "word " * 100]
Tensors = dict[str, Tensor]

# Three levels, as many heads a level, 1×1 convolutions; heads of 64, linear maps, v; nine channels in.
KINDS: dict[str, dict[str, Any]] = {
    "sd1": {"widths": (32, 64, 96), "attention": (True, True, False), "blocks": 2, "heads": 8},
    "sd2": {"widths": (64, 128), "attention": (True, True), "blocks": 1, "heads": [1, 2], "linear": True},
    "inpainting": {"widths": (32, 64), "attention": (True, False), "blocks": 1, "heads": 8, "channels": 9},
}


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@functools.lru_cache(maxsize=1)
def tokenizer() -> CLIPTokenizer:
    vocabulary, merges = clip_vocabulary()
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


@functools.lru_cache(maxsize=3)
def pipeline(kind: str) -> StableDiffusionPipeline:
    """A small random pipeline of diffusers."""
    s, v = KINDS[kind], "linear" in KINDS[kind]
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=s.get("channels", 4),
        block_out_channels=s["widths"],
        down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in s["attention"]],
        up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(s["attention"])],
        layers_per_block=s["blocks"],
        attention_head_dim=s["heads"],
        cross_attention_dim=64,
        use_linear_projection=v,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 64, 64),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=s["blocks"],
        sample_size=64,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=1,
            hidden_act="gelu" if v else "quick_gelu",
        )
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction" if v else "epsilon",
    )
    whole = StableDiffusionPipeline(
        vae,
        text,
        tokenizer(),
        unet,
        scheduler,
        None,
        None,
        requires_safety_checker=False,  # type: ignore[arg-type]
    )
    whole.set_progress_bar_config(disable=True)
    return whole


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("diffusers")

    def folder(kind: str) -> Path:
        if not (root / kind).exists():
            pipeline(kind).save_pretrained(root / kind)
        return root / kind

    return folder


@pytest.fixture(scope="session")
def loaded(folders: Callable[[str], Path]) -> Callable[[str], LatentDiffusion]:
    return functools.lru_cache(maxsize=3)(lambda kind: ldm.load(folders(kind), device="cpu"))


def equal(ours: LatentDiffusion, other: LatentDiffusion) -> bool:
    """Whether all tensors of two models are the same bits."""
    pairs = [(getattr(ours, part), getattr(other, part)) for part in ("unet", "autoencoder", "text_encoder")]
    return all(same(a.state_dict(), b.state_dict()) for a, b in pairs)


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --------------------------------------------------------------------------------------------- parity with the others


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_each_part_computes_what_the_reference_computes(loaded: Callable[[str], LatentDiffusion], kind: str) -> None:
    ours, theirs = loaded(kind), pipeline(kind)
    tokens = ours.text_encoder.tokenize(PROMPTS)
    expected = theirs.tokenizer(PROMPTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(tokens.ids, expected)
    context = theirs.text_encoder(expected).last_hidden_state
    x = torch.rand(2, 3, 72, 56, generator=torch.Generator().manual_seed(1)) * 2 - 1
    posterior, expected_posterior = ours.autoencoder.posterior(x), theirs.vae.encode(x).latent_dist
    # 504 pixels are 63 latents: odd at the first level, and odd again after it.
    z = torch.randn(2, ours.unet.in_channels, 9, 7, generator=torch.Generator().manual_seed(2))
    t = torch.tensor([3, 981])
    errors = {
        "context": relative(ours.text_encoder.encode(tokens), context),
        "mean": relative(posterior.mean, expected_posterior.mean),
        "logvar": relative(posterior.logvar, expected_posterior.logvar),
        "decoded": relative(ours.autoencoder.decode(z[:, :4]), theirs.vae.decode(z[:, :4] / 0.18215).sample),
        "unet": relative(ours.unet(z, t, context[:2]), theirs.unet(z, t, context[:2]).sample),
    }
    # Measured: at most 2.4e-6, the decoded image. float32 rounds by 6e-8, through sums of some hundred numbers.
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_a_whole_trajectory_is_that_of_the_reference(loaded: Callable[[str], LatentDiffusion], kind: str) -> None:
    ours, theirs = loaded(kind), pipeline(kind)
    assert ours.defaults.grid == "leading"
    noise = torch.randn(2, 4, 9, 7, generator=torch.Generator().manual_seed(3))
    prompts, negatives = PROMPTS[:3:2], ["blurry", "blurry"]
    out = ours.sample(prompts, negatives, steps=20, guidance_scale=7.5, latents=noise)
    common = {"height": 72, "width": 56, "num_inference_steps": 20, "guidance_scale": 7.5, "latents": noise}
    latents = theirs(prompts, negative_prompt=negatives, output_type="latent", **common).images
    images = theirs(prompts, negative_prompt=negatives, output_type="pt", **common).images
    error = relative(out.latents, latents), relative(out.images, images * 2 - 1)
    # Measured: 3.3e-6 and 7.0e-6, the pixels: 20 steps add up, and their schedule is in float32, ours in float64.
    assert max(error) < 3e-5, error


@pytest.mark.parametrize(
    ("settings", "ours", "parameters"),
    [
        ({"cross_attention_dim": 768}, {}, 859_520_964),
        (
            {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
            {"num_heads": (5, 10, 20, 20), "context_dim": 1024, "linear_projections": True},
            865_910_724,
        ),
    ],
)
def test_at_full_size_every_name_and_shape_is_the_references(
    settings: dict[str, Any], ours: dict[str, Any], parameters: int
) -> None:
    with torch.device("meta"):  # no memory: names and shapes alone
        unet, vae = UNet(**ours), Autoencoder()
        their_unet = UNet2DConditionModel(**settings)
        blocks = ["DownEncoderBlock2D"] * 4, ["UpDecoderBlock2D"] * 4
        their_vae = AutoencoderKL(3, 3, *blocks, block_out_channels=(128, 256, 512, 512), layers_per_block=2)
    assert their_unet.num_parameters() == parameters
    unet_name, vae_name = naming(unet, DIFFUSERS), naming(vae, DIFFUSERS)
    shapes = {unet_name(name): tensor.shape for name, tensor in unet.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in their_unet.state_dict().items()}
    held = {name: tensor.shape for name, tensor in vae.state_dict().items() if not name.startswith("latent_")}
    shapes = {vae_name(name): shape for name, shape in held.items()}
    assert shapes == {name: tensor.shape for name, tensor in their_vae.state_dict().items()}


def test_settings_come_with_the_weights(loaded: Callable[[str], LatentDiffusion]) -> None:
    one, two, inpainting = (loaded(kind) for kind in KINDS)
    scaled = {"name": "scaled_linear", "num_steps": 1000, "beta_start": 0.00085, "beta_end": 0.012}
    assert all(model.schedule.arguments.items() >= scaled.items() for model in (one, two))
    assert [model.prediction for model in (one, two)] == ["epsilon", "v"]
    assert (one.defaults.height, one.defaults.width, one.defaults.guidance_scale) == (64, 64, 7.5)
    assert (two.unet.arguments["num_heads"], two.unet.arguments["linear_projections"]) == ([1, 2], True)
    assert two.text_encoder.arguments["activation"] == "gelu"
    assert inpainting.unet.in_channels == 9
    assert not one.autoencoder.latent_mean.any()
    assert torch.equal(one.autoencoder.latent_std, torch.full((4,), 1 / 0.18215))


# ----------------------------------------------------------------------------------------------- the forms of a folder


def copy(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def rewrite(path: Path, change: Callable[[Tensors], Tensors]) -> None:
    safetensors.torch.save_file(change(safetensors.torch.load_file(path)), path, {"format": "pt"})


def setting(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("shape", ["linear", "1×1 convolutions"])
def test_old_attention_names_are_read(
    folders: Callable[[str], Path], loaded: Callable[[str], LatentDiffusion], tmp_path: Path, shape: str
) -> None:
    def age(tensors: Tensors) -> Tensors:
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        aged = {}
        for name, tensor in tensors.items():
            for new, before in old.items():
                if f"attentions.0.{new}." in name:
                    name = name.replace(new, before)
                    if shape != "linear" and tensor.ndim == 2:
                        tensor = tensor[:, :, None, None]
            aged[name] = tensor
        assert any("proj_attn" in name for name in aged)
        return aged

    folder = copy(folders("sd1"), tmp_path / "old")
    rewrite(folder / "vae/diffusion_pytorch_model.safetensors", age)
    assert equal(ldm.load(folder, device="cpu"), loaded("sd1"))


def test_shards_are_read_and_a_missing_one_is_named(
    folders: Callable[[str], Path], loaded: Callable[[str], LatentDiffusion], tmp_path: Path
) -> None:
    folder = copy(folders("sd1"), tmp_path / "sharded")
    shutil.rmtree(folder / "unet")
    pipeline("sd1").unet.save_pretrained(folder / "unet", max_shard_size="1MB")
    shards = sorted((folder / "unet").glob("*-of-*.safetensors"))
    assert len(shards) > 1
    assert equal(ldm.load(folder, device="cpu"), loaded("sd1"))
    shards[0].unlink()
    with pytest.raises(ValueError, match=rf"{shards[0].name} is missing, though .*index.json lists it"):
        ldm.load(folder)


def test_half_precision_variants_are_read_where_there_is_nothing_better(
    folders: Callable[[str], Path], loaded: Callable[[str], LatentDiffusion], tmp_path: Path
) -> None:
    folder = copy(folders("sd1"), tmp_path / "half")
    for path in list(folder.rglob("*.safetensors")):
        rewrite(path, lambda tensors: {name: tensor.half() for name, tensor in tensors.items()})
        path.rename(path.with_suffix(".fp16.safetensors"))
    half = ldm.load(folder, device="cpu")
    assert half.dtype == torch.float32  # on a CPU
    expected = {name: tensor.half().float() for name, tensor in loaded("sd1").unet.state_dict().items()}
    assert same(half.unet.state_dict(), expected)
    shutil.copy(folders("sd1") / "unet/diffusion_pytorch_model.safetensors", folder / "unet")
    assert same(ldm.load(folder, device="cpu").unet.state_dict(), loaded("sd1").unet.state_dict())


def test_weights_before_averaging_are_read_when_asked_for(folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy(folders("inpainting"), tmp_path / "both")
    averaged = folder / "unet/diffusion_pytorch_model.safetensors"
    raw = averaged.with_name("diffusion_pytorch_model.non_ema.safetensors")
    shutil.copy(averaged, raw)
    rewrite(raw, lambda tensors: {name: tensor + 1 for name, tensor in tensors.items()})
    ema, other = (next(ldm.load(folder, weights, "cpu").unet.parameters()) for weights in ("ema", "raw"))
    assert torch.equal(ema + 1, other)


def test_an_autoencoder_and_a_text_tower_are_read_alone(
    folders: Callable[[str], Path], loaded: Callable[[str], LatentDiffusion], tmp_path: Path
) -> None:
    folder = folders("sd1")
    for source in (folder, folder / "vae"):
        assert same(ldm.load_autoencoder(source).state_dict(), loaded("sd1").autoencoder.state_dict())
    alone = copy(folder / "text_encoder", tmp_path / "text")
    for source in (folder, folder / "text_encoder", alone):
        text = ldm.load_text_encoder(source)
        assert same(text.state_dict(), loaded("sd1").text_encoder.state_dict())
        assert torch.equal(text.tokenize(PROMPTS).ids, loaded("sd1").text_encoder.tokenize(PROMPTS).ids)
    with torch.device("meta"):
        clip = CLIPModel(CLIPConfig(text_config=pipeline("sd1").text_encoder.config.to_dict()))
    tower = {f"text_model.{name}": tensor for name, tensor in safetensors.torch.load_file(
        folder / "text_encoder/model.safetensors").items()}  # fmt: skip
    rest = {name: torch.zeros(1) for name in clip.state_dict() if not name.startswith("text_model.")}
    safetensors.torch.save_file(tower | rest, alone / "model.safetensors")
    clip.config.save_pretrained(alone)
    assert same(ldm.load_text_encoder(alone).state_dict(), loaded("sd1").text_encoder.state_dict())
    vae = {name.removeprefix("first_stage_model."): tensor for name, tensor in compvis(loaded("sd1")).items()
           if name.startswith("first_stage_model.")}  # fmt: skip
    safetensors.torch.save_file(vae | {"loss.logvar": torch.zeros(1)}, tmp_path / "vae.safetensors")
    again = ldm.load_autoencoder(tmp_path / "vae.safetensors")
    assert same(again.state_dict(), loaded("sd1").autoencoder.state_dict())
    with pytest.raises(ValueError, match=r"only one part of a model; use ldm\.load_autoencoder"):
        ldm.load(folder / "vae")
    with pytest.raises(ValueError, match="holds a UNet2DConditionModel alone"):
        ldm.load(folder / "unet")


# -------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_comes_back_bit_for_bit(
    folders: Callable[[str], Path], loaded: Callable[[str], LatentDiffusion], tmp_path: Path, kind: str
) -> None:
    folder, back = folders(kind), tmp_path / "back"
    export_diffusers(loaded(kind), back)
    for path in folder.rglob("*.safetensors"):
        again = safetensors.torch.load_file(back / path.relative_to(folder))
        before = safetensors.torch.load_file(path)
        assert same({name.removeprefix("text_model."): tensor for name, tensor in again.items()}, before), path
    for name in ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json", "text_encoder/config.json"):
        before, again = (json.loads((root / name).read_text()) for root in (folder, back))
        # Settings of how it was made, and the defaults that we leave out.
        shared = (before.keys() & again.keys()) - {"_name_or_path", "projection_dim", "pad_token_id"}
        assert {key: before[key] for key in shared} == {key: again[key] for key in shared}, name
    assert equal(ldm.load(back, device="cpu"), loaded(kind))
    loaded(kind).save(tmp_path / "ours")
    assert equal(ldm.load(tmp_path / "ours", device="cpu"), loaded(kind))


def test_the_reference_opens_what_we_export_and_draws_the_same(
    loaded: Callable[[str], LatentDiffusion], tmp_path: Path
) -> None:
    ours = loaded("sd1")
    export_diffusers(ours, tmp_path / "out")
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    theirs.set_progress_bar_config(disable=True)
    assert isinstance(theirs, StableDiffusionPipeline)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    images = theirs("a cat", num_inference_steps=3, guidance_scale=7.5, latents=noise, output_type="pt").images
    assert relative(ours.sample("a cat", steps=3, latents=noise).images, images * 2 - 1) < 3e-5  # as a trajectory
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_an_export_refuses_what_the_format_cannot_hold(
    loaded: Callable[[str], LatentDiffusion], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"tower is minilm.*a stem of 4.*shifted or scaled a channel") as caught:
        export_diffusers(tiny_model(), tmp_path / "out")
    assert "\n" not in str(caught.value)
    ours = loaded("sd1")
    other = LatentDiffusion(
        ours.unet, ours.autoencoder, ours.text_encoder, ours.schedule, null_context=torch.ones(77, 64)
    )
    with pytest.raises(ValueError, match="the empty prompt of its training is not that of its text tower"):
        export_diffusers(other, tmp_path / "out")
    pooling = UNet(**ours.unet.arguments | {"pooled_text": True})
    with pytest.raises(ValueError, match="its UNet embeds the pooled text"):
        export_diffusers(LatentDiffusion(pooling, ours.autoencoder, ours.text_encoder, ours.schedule), tmp_path / "out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="exists; name a folder that does not"):
        export_diffusers(ours, tmp_path / "out")


# ------------------------------------------------------------------------------------------------------- single files


def open_clip(text: Tensors) -> Tensors:
    """A tower of transformers as OpenCLIP keeps it: query, key and value in one, and a last layer that is not used."""
    names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj"}
    names |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    out = {
        "token_embedding.weight": text["embeddings.token_embedding.weight"],
        "positional_embedding": text["embeddings.position_embedding.weight"],
        **{f"ln_final.{last}": text[f"final_layer_norm.{last}"] for last in ("weight", "bias")},
        "text_projection": torch.zeros(64, 64),
        "logit_scale": torch.tensor(1.0),
    }
    for layer, source in ((0, 0), (1, 1), (2, 0)):
        here, there = f"transformer.resblocks.{layer}", f"encoder.layers.{source}"
        for last in ("weight", "bias"):
            fused = torch.cat([text[f"{there}.self_attn.{part}_proj.{last}"] for part in "qkv"])
            out[f"{here}.attn.in_proj_{last}"] = fused
            out |= {f"{here}.{new}.{last}": text[f"{there}.{old}.{last}"].clone() for old, new in names.items()}
    return out


def compvis(model: LatentDiffusion) -> Tensors:
    """A model as a CompVis single file, with what training leaves in one."""
    unet, vae = naming(model.unet, COMPVIS), naming(model.autoencoder, COMPVIS)
    out = {f"model.diffusion_model.{unet(name)}": tensor for name, tensor in model.unet.state_dict().items()}
    for name, tensor in model.autoencoder.state_dict().items():
        if not name.startswith("latent_"):
            wide = tensor.ndim == 2  # attention is kept as 1×1 convolutions
            out[f"first_stage_model.{vae(name)}"] = tensor[:, :, None, None] if wide else tensor
    text = {name.removeprefix("tower."): tensor for name, tensor in model.text_encoder.state_dict().items()}
    if model.unet.arguments["linear_projections"]:
        out |= {f"cond_stage_model.model.{name}": tensor for name, tensor in open_clip(text).items()}
    else:
        out |= {f"cond_stage_model.transformer.text_model.{name}": tensor for name, tensor in text.items()}
        out["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    out |= {"betas": beta.float(), "alphas_cumprod": (1 - beta).cumprod(0).float(), "logvar": torch.zeros(1000)}
    return {name: tensor.contiguous() for name, tensor in out.items()}


def averaged(tensors: Tensors) -> Tensors:
    """The same with averages, which are 1 more, under CompVis' names without dots."""
    ema = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    for name, tensor in tensors.items():
        if name.startswith("model."):
            ema[f"model_ema.{name.removeprefix('model.').replace('.', '')}"] = tensor + 1
    return tensors | ema


@pytest.mark.parametrize("kind", KINDS)
def test_the_names_of_single_files_are_those_the_reference_reads(
    loaded: Callable[[str], LatentDiffusion], kind: str
) -> None:
    tensors, theirs = compvis(loaded(kind)), pipeline(kind)
    unet = reference.convert_ldm_unet_checkpoint(dict(tensors), dict(theirs.unet.config))
    assert same(unet, theirs.unet.state_dict())
    vae = reference.convert_ldm_vae_checkpoint(dict(tensors), dict(theirs.vae.config))
    assert same(vae, theirs.vae.state_dict())
    if kind == "sd2":
        found = reference.convert_open_clip_checkpoint(theirs.text_encoder, dict(tensors))
        found = {name.removeprefix("text_model."): tensor for name, tensor in found.items()}
        expected = theirs.text_encoder.state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_file_gives_the_tensors_that_went_in(
    loaded: Callable[[str], LatentDiffusion], tmp_path: Path, kind: str
) -> None:
    ours, path = loaded(kind), tmp_path / "model.safetensors"
    safetensors.torch.save_file(compvis(ours), path)
    if kind == "sd2":
        (tmp_path / "model.yaml").write_text(yaml.safe_dump({"model": {"params": {"parameterization": "v"}}}))
    again = ldm.load(path, device="cpu")
    assert equal(again, ours)
    assert (again.prediction, again.schedule.arguments) == (ours.prediction, ours.schedule.arguments)
    assert (again.defaults.grid, again.defaults.height) == ("leading", 768 if kind == "sd2" else 512)
    assert again.unet.arguments == ours.unet.arguments
    if kind != "sd2":
        assert again.text_encoder.arguments == ours.text_encoder.arguments
    else:
        assert again.text_encoder.arguments == ours.text_encoder.arguments | {"pad_token": 0}
    assert same(ldm.load_autoencoder(path).state_dict(), ours.autoencoder.state_dict())
    assert same(ldm.load_text_encoder(path).state_dict(), ours.text_encoder.state_dict())


def test_averaged_weights_of_a_single_file_are_taken_unless_raw_ones_are_asked_for(
    loaded: Callable[[str], LatentDiffusion], tmp_path: Path
) -> None:
    ours = loaded("inpainting")
    safetensors.torch.save_file(averaged(compvis(ours)), tmp_path / "both.safetensors")
    ema = ldm.load(tmp_path / "both.safetensors", device="cpu").unet.state_dict()
    assert same(ema, {name: tensor + 1 for name, tensor in ours.unet.state_dict().items()})
    raw = ldm.load(tmp_path / "both.safetensors", weights="raw", device="cpu")
    assert equal(raw, ours)


def test_a_family_that_does_not_say_what_it_predicts_is_asked_about(
    loaded: Callable[[str], LatentDiffusion], tmp_path: Path
) -> None:
    tensors = compvis(loaded("sd2"))
    safetensors.torch.save_file(tensors, tmp_path / "sd2.safetensors")
    with pytest.raises(ValueError, match=r"epsilon and v models look the same.*prediction=v"):
        ldm.load(tmp_path / "sd2.safetensors")
    convert(tmp_path / "sd2.safetensors", tmp_path / "v", prediction="v")
    convert(tmp_path / "sd2.safetensors", tmp_path / "epsilon", prediction="epsilon")
    assert [ldm.load(tmp_path / name, device="cpu").prediction for name in ("v", "epsilon")] == ["v", "epsilon"]
    safetensors.torch.save_file(tensors | {"v_pred": torch.zeros(0)}, tmp_path / "marked.safetensors")
    assert read(tmp_path / "marked.safetensors")[0].settings["prediction"] == "v"
    safetensors.torch.save_file(tensors, tmp_path / "said.safetensors", {"modelspec.prediction_type": "epsilon"})
    assert read(tmp_path / "said.safetensors")[0].settings["prediction"] == "epsilon"


def test_schedule_and_scale_of_a_single_file_are_read_where_it_has_them(
    loaded: Callable[[str], LatentDiffusion], tmp_path: Path
) -> None:
    tensors = compvis(loaded("inpainting"))
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(tensors | {"betas": torch.linspace(1e-4, 0.02, 500)}, path)
    schedule = read(path)[0].settings["schedule"]
    assert schedule == {"name": "linear", "num_steps": 500, "beta_start": 1e-4, "beta_end": 0.02}
    safetensors.torch.save_file(tensors | {"ztsnr": torch.zeros(0), "v_pred": torch.zeros(0)}, path)
    assert not ldm.load(path, device="cpu").schedule.alpha_bar[-1]
    safetensors.torch.save_file(tensors | {"ztsnr": torch.zeros(0)}, path)
    with pytest.raises(ValueError, match="no image is left at its last step, where epsilon says nothing"):
        read(path)
    safetensors.torch.save_file(tensors | {"betas": torch.full((1000,), 0.01).cumsum(0) / 1000}, path)
    assert read(path)[0].settings["schedule"]["name"] == "linear"
    for betas in (torch.linspace(0.1, 0.9, 1000) ** 3, torch.linspace(0.02, 1e-4, 1000), torch.full((9,), 2.0)):
        safetensors.torch.save_file(tensors | {"betas": betas}, path)
        with pytest.raises(ValueError, match=r"model\.safetensors: its betas, .* are no schedule known here"):
            read(path)
    safetensors.torch.save_file(tensors, path)
    params = {"scale_factor": 0.5, "linear_start": 0.00085, "unet_config": {"params": {"num_head_channels": 16}}}
    path.with_suffix(".yaml").write_text(yaml.safe_dump({"model": {"params": params}}))
    model = ldm.load(path, device="cpu")
    assert model.unet.arguments["num_heads"] == [2, 4]
    assert torch.equal(model.autoencoder.latent_std, torch.full((4,), 2.0))


# ------------------------------------------------------------------------------------------------------------ pickles


class Honest:
    """Stands for a callback of Lightning in a checkpoint: its module is renamed below."""


def test_an_old_checkpoint_is_converted(
    loaded: Callable[[str], LatentDiffusion], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = loaded("inpainting")
    monkeypatch.setattr(Honest, "__module__", "lightning.callbacks")
    module = types.ModuleType("lightning.callbacks")
    module.Honest = Honest  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lightning.callbacks", module)
    monkeypatch.setitem(sys.modules, "lightning", types.ModuleType("lightning"))
    callback = Honest()
    callback.best = np.float64(0.5)  # type: ignore[attr-defined]
    whole = {
        "state_dict": OrderedDict(averaged(compvis(ours))),
        "epoch": 3,
        "global_step": 875000,
        "callbacks": {Honest: callback},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.rand(3)}}}],
        "hyper": {np.dtype("float32"), frozenset({1})},
    }
    torch.save(whole, tmp_path / "old.ckpt")
    # What turns torch.load's own check off is no matter here.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(ValueError, match=r"is a pickle.*use: ldm convert"):
        ldm.load(tmp_path / "old.ckpt")
    assert main(["convert", str(tmp_path / "old.ckpt"), str(tmp_path / "raw"), "weights=raw"]) == 0
    assert equal(ldm.load(tmp_path / "raw", device="cpu"), ours)
    assert main(["convert", str(tmp_path / "old.ckpt"), str(tmp_path / "half"), "half=true"]) == 0
    half = read(tmp_path / "half")[0].components["unet"].state_dict()
    assert same(half, {name: (tensor + 1).half() for name, tensor in ours.unet.state_dict().items()})


class Hostile:
    """On unpickling, calls a function with arguments."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (__import__("os").system, ("touch {}",), r"posix\.system"),
        (eval, ("open({!r}, 'w')",), r"builtins\.eval"),
        (exec, ("open({!r}, 'w')",), r"builtins\.exec"),
        (getattr, (dict, "get"), r"builtins\.getattr"),
        (__import__("importlib").import_module, ("os",), r"importlib\.import_module"),
        (torch.load, ("{}",), r"torch\.serialization\.load"),
        (__import__("subprocess").Popen, (["touch", "{}"],), r"commands\.Popen"),  # as Python 2 called it
        (functools.partial, (print,), r"functools\.partial"),
    ],
)
def test_a_hostile_pickle_does_nothing_and_is_named(
    tmp_path: Path, zipped: bool, function: Callable[..., Any], arguments: tuple[Any, ...], name: str
) -> None:
    mark = tmp_path / "mark"
    arguments = tuple(a.format(str(mark)) if isinstance(a, str) else a for a in arguments)
    whole = {"state_dict": {"a": torch.zeros(2)}, "evil": Hostile(function, *arguments)}
    torch.save(whole, tmp_path / "evil.ckpt", _use_new_zipfile_serialization=zipped)
    match = rf"refused: its pickle asks for .*{name}.*nothing was run" if zipped else r"before torch 1\.6.*not read"
    with pytest.raises(ValueError, match=match):
        convert(tmp_path / "evil.ckpt", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.ckpt"]


def test_a_damaged_or_lying_pickle_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {"a": torch.rand(100)}}, path)
    whole = path.read_bytes()
    for cut in (10, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="is damaged or cut short"):
            open_pickle(path)
    for value in ([1, 2], {"a": 1}, {3: torch.zeros(1)}):
        torch.save(value, path)
        with pytest.raises(ValueError, match="holds no tensors by name"):
            open_pickle(path)
    path.write_bytes(pickle.dumps({"a": 1}, protocol=2))
    with pytest.raises(ValueError, match=r"before torch 1\.6.*not read"):
        open_pickle(path)
    path.write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"no file of torch\.save"):
        open_pickle(path)


@pytest.mark.parametrize("asking", [
    b"\x80\x05\x96" + (2**40).to_bytes(8, "little"),  # bytes
    b"\x80\x02X" + (2**32 - 1).to_bytes(4, "little"),  # a text
    b"\x80\x02K\x01r" + (2**31 - 1).to_bytes(4, "little"),  # a place in a table
    b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu"
    b"J\xff\xff\xff\x7ftQK\0(J\xff\xff\xff\x7ft(K\x01t\x89NtR",  # a storage that the file does not hold
])  # fmt: skip
def test_a_pickle_that_asks_for_gigabytes_gets_none(tmp_path: Path, asking: bytes) -> None:
    path = tmp_path / "model.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (("data.pkl", asking + b"."), ("version", b"3\n"), ("data/0", bytes(64))):
            archive.writestr(f"model/{name}", data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"is damaged or cut short|holds no tensors by name"):
        open_pickle(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 2**10  # KiB


def test_one_changed_bit_of_a_weight_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {"a": torch.full((1000,), 1.5)}}, path)
    whole = bytearray(path.read_bytes())
    whole[whole.index(bytes(torch.tensor([1.5, 1.5]).numpy())) + 2] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="is damaged or cut short"):
        open_pickle(path)


def test_a_pickle_with_changed_bytes_is_read_or_refused_in_one_way(tmp_path: Path) -> None:
    path, draw = tmp_path / "model.ckpt", random.Random(0)
    torch.save({"state_dict": {"a": torch.rand(4, 3), "b": torch.rand(2).half()}}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    outcomes = set()
    for _ in range(600):
        changed = bytearray(records["model/data.pkl"])
        for _ in range(draw.randint(1, 3)):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        with zipfile.ZipFile(path, "w") as archive:  # its checksums fit
            for name, data in (records | {"model/data.pkl": bytes(changed)}).items():
                archive.writestr(name, data)
        try:
            source = open_pickle(path)
            for name in source.shapes:
                source.read(name)
            outcomes.add("read")
        except ValueError:  # any other error fails the test
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_views_of_one_storage_are_read_as_they_were(tmp_path: Path) -> None:
    base = torch.arange(12.0)
    tensors = {
        "part": base[3:7], "turned": base.view(3, 4).T, "number": base[5], "empty": torch.zeros(0, 3),
        "half": torch.rand(3).half(), "brain": torch.rand(3).bfloat16(), "whole": torch.tensor([1, 2]),
        "parameter": torch.nn.Parameter(torch.rand(2)),
    }  # fmt: skip
    torch.save(tensors, tmp_path / "views.pt")
    source = open_pickle(tmp_path / "views.pt")
    assert same({name: source.read(name) for name in source.shapes}, {n: t.data for n, t in tensors.items()})
    torch.save(tensors, tmp_path / "views.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"before torch 1\.6"):
        open_pickle(tmp_path / "views.pt")
    sparse = {"a": torch.ones(2, 2).to_sparse()}
    torch.save(sparse, tmp_path / "sparse.pt")
    with pytest.raises(ValueError, match="a is no plain tensor"):
        open_pickle(tmp_path / "sparse.pt")
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", bytes(2**24))
    with pytest.raises(ValueError, match="compressed zip"):
        open_pickle(tmp_path / "bomb.pt")


def test_a_folder_of_pickles_alone_is_for_convert(
    folders: Callable[[str], Path], loaded: Callable[[str], LatentDiffusion], tmp_path: Path
) -> None:
    folder = copy(folders("inpainting"), tmp_path / "bins")
    for path in list(folder.rglob("*.safetensors")):
        name = "pytorch_model.bin" if path.stem == "model" else f"{path.stem}.bin"
        torch.save(safetensors.torch.load_file(path), path.with_name(name))
        path.unlink()
    with pytest.raises(ValueError, match=r"it holds pickles \(diffusion_pytorch_model.bin\); use ldm convert"):
        ldm.load(folder)
    convert(folder, tmp_path / "out")
    assert equal(ldm.load(tmp_path / "out", device="cpu"), loaded("inpainting"))


# ------------------------------------------------------------------------------------------------------------ refusals


def refused(path: Path, match: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=match) as caught:
        ldm.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "values", "match"),
    [
        ("model_index.json", {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}, "'text_encoder_2'"),
        ("model_index.json", {"transformer": ["diffusers", "SD3Transformer2DModel"]}, "by its part 'transformer'"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "addition_embed_type='text_time'"),
        ("unet/config.json", {"num_class_embeds": 1000}, "num_class_embeds=1000"),
        ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type="),
        ("unet/config.json", {"time_cond_proj_dim": 256}, "time_cond_proj_dim=256"),
        ("unet/config.json", {"act_fn": "gelu"}, "act_fn='gelu', the rule is silu"),
        ("unet/config.json", {"transformer_layers_per_block": [1, 2, 10]}, "transformer_layers_per_block"),
        ("unet/config.json", {"in_channels": 8}, r"conv_in.weight is \(32, 4, 3, 3\), not \(32, 8, 3, 3\)"),
        ("unet/config.json", {"block_out_channels": [32, 64, 128]}, "as UNet, does not fit: .* in all"),
        ("unet/config.json", {"use_linear_projection": True}, "proj_in.weight is"),
        ("vae/config.json", {"latents_mean": [0.0] * 4}, "latents_mean="),
        ("vae/config.json", {"shift_factor": 0.1}, "shift_factor=0.1"),
        ("text_encoder/config.json", {"max_position_embeddings": 248}, "max_position_embeddings=248, the rule is 77"),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1]}, "trained_betas="),
        ("scheduler/scheduler_config.json", {"beta_schedule": "squaredcos_cap_v2"}, "choose linear or scaled_linear"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow_prediction"}, "known are epsilon"),
        ("scheduler/scheduler_config.json", {"set_alpha_to_one": True}, "leading grids end at the first step"),
        ("scheduler/scheduler_config.json", {"shift": 3.0}, "shift=3.0, that setting is unknown"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(
    folders: Callable[[str], Path], tmp_path: Path, file: str, values: dict[str, Any], match: str
) -> None:
    folder = copy(folders("sd1"), tmp_path / "model")
    setting(folder / file, **values)
    refused(folder, match)


def test_a_unet_of_other_channels_is_refused(folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy(folders("sd1"), tmp_path / "model")
    setting(folder / "unet/config.json", in_channels=8)
    rewrite(
        folder / "unet/diffusion_pytorch_model.safetensors",
        lambda tensors: tensors | {"conv_in.weight": torch.zeros(32, 8, 3, 3)},
    )
    refused(folder, "its UNet takes 8 channels and gives 4; the rule is 4, or taking 9 with a mask")


def test_tensors_that_do_not_fit_are_listed_by_their_own_names(folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy(folders("sd1"), tmp_path / "model")
    weights = folder / "unet/diffusion_pytorch_model.safetensors"

    def spoil(tensors: Tensors) -> Tensors:
        kept = {name: tensor for name, tensor in tensors.items() if name != "conv_in.bias"}
        return kept | {"lora.up": torch.zeros(1), "conv_out.bias": torch.zeros(5)}

    rewrite(weights, spoil)
    refused(folder, r"conv_out.bias is \(5,\), not \(4,\); missing conv_in.bias; unexpected lora.up")
    for name, value in (("NaN", float("nan")), ("infinity", float("inf"))):
        shutil.copy(folders("sd1") / "unet" / weights.name, weights)
        rewrite(weights, lambda tensors, v=value: tensors | {"conv_in.bias": torch.full((32,), v).half()})
        refused(folder, "conv_in.bias holds NaN or infinite values; take weights of higher precision")
        assert name


def test_files_that_are_not_what_they_seem_are_one_line(folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy(folders("sd1"), tmp_path / "model")
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    for cut in (4, 1000, len(whole) - 4):
        weights.write_bytes(whole[:cut])
        refused(folder, "is damaged or cut short")
    for zipped in (True, False):
        torch.save({"a": torch.zeros(1)}, weights, _use_new_zipfile_serialization=zipped)
        refused(folder, "is a pickle, whatever its name says; use: ldm convert")
    weights.unlink()
    refused(folder, "holds no diffusion_pytorch_model.safetensors.*incomplete")
    (folder / "unet/config.json").write_text("{")
    (tmp_path / "x").mkdir()
    refused(tmp_path / "x", r"no checkpoint at .*holds no manifest\.json")


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("conditioner.embedders.0.transformer.text_model.x", "is SDXL"),
        ("model.diffusion_model.label_emb.0.0.weight", "class-conditional"),
        ("model.diffusion_model.joint_blocks.0.x", "is SD 3"),
        ("double_blocks.0.x", "is Flux"),
        ("control_model.x", "is ControlNet"),
        ("depth_model.x", "is SD 2 depth"),
        ("embedding_manager.x", "unexpected embedding_manager.x"),
        ("model.diffusion_model.input_blocks.1.1.transformer_blocks.1.norm1.weight", "unexpected input_blocks.1.1"),
    ],
)
def test_single_files_of_other_families_are_refused(
    loaded: Callable[[str], LatentDiffusion], tmp_path: Path, name: str, match: str
) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(compvis(loaded("inpainting")) | {name: torch.zeros(1)}, path)
    refused(path, match)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(1)}, path)
    refused(path, r"holds no model\.diffusion_model")
    safetensors.torch.save_file({"model.diffusion_model.a": torch.zeros(1)}, path)
    refused(path, r"holds no UNet of SD 1\.x or 2\.x")
    with pytest.raises(ValueError, match="holds no autoencoder"):
        ldm.load_autoencoder(path)
    with pytest.raises(ValueError, match="choose ema or raw"):
        ldm.load(path, weights="best")


def test_half_precision_that_cannot_hold_a_weight_is_refused(folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy(folders("sd1"), tmp_path / "model")
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    rewrite(path, lambda tensors: tensors | {"conv_in.bias": torch.full((32,), 1e5)})
    with pytest.raises(ValueError, match=r"half=true: unet.input_blocks.0.bias reaches 1e\+05, more than float16"):
        convert(folder, tmp_path / "half", half=True)
    assert main(["convert", str(folder), str(folder)]) == 2
    assert main(["convert", str(folder), str(tmp_path / "out"), "half=2"]) == 2
    assert main(["convert", str(tmp_path / "nothing"), str(tmp_path / "out")]) == 2
    assert main(["convert"]) == 2
    assert main(["convert", "--help"]) == 0


def test_a_hub_id_is_fetched_and_without_a_network_is_one_line(
    folders: Callable[[str], Path],
    loaded: Callable[[str], LatentDiffusion],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import huggingface_hub

    asked: list[str] = []

    def snapshot(name: str, **patterns: Any) -> str:
        asked.append(name)
        return str(folders("inpainting"))

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "snapshot_download", snapshot)
        assert equal(ldm.load("someone/inpainting", device="cpu"), loaded("inpainting"))
        assert asked == ["someone/inpainting"]

    def offline(name: str, **patterns: Any) -> str:
        raise ConnectionError("no route to host\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        FileNotFoundError, match=r"no model at someone/model: .*no route to host.*the network"
    ) as caught:
        ldm.load("someone/model")
    assert "\n" not in str(caught.value)
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no model at runs/mistyped: give"):
        ldm.load("runs/mistyped")


# ---------------------------------------------------------------------------------------------------------- full size


@pytest.mark.slow
@torch.no_grad()
def test_full_size_with_random_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """859.5 M + 83.7 M + 123.1 M parameters: both sides from one folder, one after the other, to spare memory."""
    lines = []

    def stage(name: str, begin: float) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        lines.append(f"{name}: {time.perf_counter() - begin:.1f} s, peak {peak:.1f} GiB")

    t0 = time.perf_counter()
    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    counts = [unet.num_parameters()]
    unet.save_pretrained(tmp_path / "sd/unet")
    del unet
    widths = (128, 256, 512, 512)
    vae = AutoencoderKL(3, 3, ["DownEncoderBlock2D"] * 4, ["UpDecoderBlock2D"] * 4, widths, 2, sample_size=512)
    counts.append(vae.num_parameters())
    vae.save_pretrained(tmp_path / "sd/vae")
    del vae
    text = CLIPTextModel(
        CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    )
    counts.append(text.num_parameters())
    text.save_pretrained(tmp_path / "sd/text_encoder")
    tokenizer().save_pretrained(tmp_path / "sd/tokenizer")
    pipeline("sd1").scheduler.save_pretrained(tmp_path / "sd/scheduler")
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": diffusers.__version__}
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    index |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    index |= {"scheduler": ["diffusers", "DDIMScheduler"], "safety_checker": [None, None]}
    index |= {"feature_extractor": [None, None], "requires_safety_checker": False}
    (tmp_path / "sd/model_index.json").write_text(json.dumps(index))
    assert counts == [859_520_964, 83_653_863, 123_060_480]
    stage("made and written by diffusers", t0)

    noise = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(5))
    t0 = time.perf_counter()
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path / "sd")
    stage("loaded by diffusers", t0)
    t0 = time.perf_counter()
    theirs.set_progress_bar_config(disable=True)
    settings = {"height": 256, "width": 256, "num_inference_steps": 2, "latents": noise, "output_type": "pt"}
    expected = theirs("a red apple", negative_prompt="blurry", **settings).images * 2 - 1
    stage("2 steps with guidance and decoding at 256×256 by diffusers", t0)
    del theirs
    gc.collect()

    t0 = time.perf_counter()
    ours = ldm.load(tmp_path / "sd", device="cpu")
    stage("loaded by ldm", t0)
    t0 = time.perf_counter()
    images = ours.sample("a red apple", "blurry", steps=2, latents=noise).images
    stage("2 steps with guidance and decoding at 256×256 by ldm", t0)
    error = relative(images, expected)
    lines.append(f"largest difference of the pictures over their largest value: {error:.1e}")
    t0 = time.perf_counter()
    export_diffusers(ours, tmp_path / "back")
    stage("exported by ldm", t0)
    for path in (tmp_path / "sd").rglob("*.safetensors"):
        before = safetensors.torch.load_file(path)
        again = safetensors.torch.load_file(tmp_path / "back" / path.relative_to(tmp_path / "sd"))
        assert same({name.removeprefix("text_model."): tensor for name, tensor in again.items()}, before)
    with capsys.disabled():
        print("\n" + "\n".join(lines))
    assert error < 1e-3  # what whole trajectories are held to
