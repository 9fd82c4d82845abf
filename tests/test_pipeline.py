from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ldm.pipeline import LatentDiffusion
from ldm.provenance import read_png
from tests.conftest import tiny_model

PROMPTS = ["a red square", "a green disc", ""]


@pytest.mark.parametrize("family", ["clip", "minilm"])
@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_sampling_gives_images_prompt_major_with_a_seed_each(family: str, prediction: str) -> None:
    out = tiny_model(family, prediction).sample(PROMPTS, num_images=2, steps=3, seed=5)
    assert out.images.shape == (6, 3, 32, 32)
    assert out.images.dtype == torch.float32
    assert out.images.abs().max() <= 1.0
    assert out.seeds == [5, 6, 7, 8, 9, 10]
    assert out.prompts == [p for p in PROMPTS for _ in range(2)]


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_an_image_does_not_depend_on_its_batch(model: LatentDiffusion, sampler: str) -> None:
    together = model.sample(PROMPTS, num_images=2, steps=4, sampler=sampler, seed=0)
    split = model.sample(PROMPTS, num_images=2, steps=4, sampler=sampler, seed=0, batch_size=1)
    alone = model.sample(PROMPTS[1], steps=4, sampler=sampler, seed=3)
    # Kernels for another batch size may round differently; four steps of a random UNet amplify that.
    torch.testing.assert_close(together.latents, split.latents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together.latents[3:4], alone.latents, rtol=1e-4, atol=1e-4)
    assert (together.latents[2] - together.latents[3]).abs().max() > 0.1


def test_the_same_call_gives_the_same_bits_and_seed_zero_is_a_seed(model: LatentDiffusion) -> None:
    torch.manual_seed(1)
    first = model.sample("a red square", steps=3, seed=0)
    torch.manual_seed(2)
    assert torch.equal(first.images, model.sample("a red square", steps=3, seed=0).images)
    assert not torch.equal(first.images, model.sample("a red square", steps=3, seed=1).images)


def test_a_seed_that_is_not_given_is_drawn_and_reported(model: LatentDiffusion) -> None:
    out = model.sample("a red square", steps=2, seed=None)
    assert torch.equal(out.images, model.sample("a red square", steps=2, seed=out.seeds[0]).images)
    assert model.sample("a red square", steps=2, seed=None).seeds != out.seeds


def test_a_list_of_seeds_gives_one_an_image(model: LatentDiffusion) -> None:
    out = model.sample(["a red square", "a green disc"], steps=2, seed=[9, 4])
    assert torch.allclose(out.latents[1:], model.sample("a green disc", steps=2, seed=4).latents, atol=1e-4)


def test_negative_prompts_one_for_all_or_one_a_prompt_change_the_picture(model: LatentDiffusion) -> None:
    plain = model.sample(PROMPTS[:2], steps=3)
    one = model.sample(PROMPTS[:2], "a blue disc", steps=3)
    each = model.sample(PROMPTS[:2], ["", "a blue disc"], steps=3)
    assert not torch.allclose(plain.latents[0], one.latents[0], atol=1e-4)
    torch.testing.assert_close(each.latents[0], plain.latents[0])
    torch.testing.assert_close(each.latents[1], one.latents[1])


def test_the_null_context_of_the_checkpoint_is_what_guidance_uses(model: LatentDiffusion) -> None:
    before = model.sample("a red square", steps=2).latents
    model.null_context = model.null_context + 1.0
    assert not torch.allclose(before, model.sample("a red square", steps=2).latents)


def test_cut_prompts_are_flagged_an_image(model: LatentDiffusion) -> None:
    out = model.sample(["a red square", "red " * 100], num_images=2, steps=1)
    assert out.truncated.tolist() == [False, False, True, True]


@pytest.mark.parametrize(("height", "width"), [(8, 8), (40, 24), (72, 8)])
def test_any_multiple_of_eight_is_a_size(model: LatentDiffusion, height: int, width: int) -> None:
    assert model.sample("a red square", steps=1, height=height, width=width).images.shape[2:] == (height, width)


def test_starting_latents_set_the_size_and_replace_the_seed_noise(model: LatentDiffusion) -> None:
    latents = torch.randn(1, 4, 3, 5)
    assert model.sample("a red square", steps=2, latents=latents).images.shape[2:] == (24, 40)
    with pytest.raises(ValueError, match="height=32 contradicts the latents"):
        model.sample("a red square", latents=latents, height=32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": []}, "the list of prompts is empty"),
        ({"prompt": ["a", 3]}, "must be text"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
        ({"num_images": 0}, "num_images=0"),
        ({"steps": 0}, "from 1 to 1000"),
        ({"steps": 1001}, "from 1 to 1000"),
        ({"guidance_scale": math.nan}, "guidance_scale=nan"),
        ({"guidance_scale": -1.0}, "guidance_scale=-1.0"),
        ({"guidance_scale": math.inf}, "guidance_scale=inf"),
        ({"guidance_scale": 1.0, "negative_prompt": "blurry"}, "would ignore the negative prompt"),
        ({"sampler": "dimm"}, "choose one of"),
        ({"grid": "karass"}, "choose one of"),
        ({"seed": [1, 2]}, "2 seeds for 1 images"),
        ({"seed": 1.5}, "a whole number"),
        ({"seed": ["a"]}, "not a whole number"),
        ({"height": 500}, "the nearest are 496 and 504"),
        ({"height": 0}, "at least 8"),
        ({"width": -8}, "at least 8"),
        ({"eta": 0.5, "sampler": "ddpm"}, "leave it out"),
        ({"eta": -1.0}, "finite number >= 0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"latents": torch.zeros(2, 4, 4, 4)}, "the rule is"),
        ({"latents": torch.full((1, 4, 4, 4), math.nan)}, "NaN"),
    ],
)
def test_bad_requests_get_one_clear_line(model: LatentDiffusion, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        model.sample(**{"prompt": "a red square", **settings})
    assert "\n" not in str(caught.value)


def test_a_misspelt_setting_is_an_error(model: LatentDiffusion) -> None:
    with pytest.raises(TypeError, match="guidence_scale"):
        model.sample("a red square", guidence_scale=3.0)  # type: ignore[call-arg]


@pytest.mark.parametrize("part", ["unet", "autoencoder"])
def test_nan_in_the_weights_is_an_error_never_a_black_picture(model: LatentDiffusion, part: str) -> None:
    list(getattr(model, part).parameters())[-1].data.fill_(math.nan)
    with pytest.raises(ValueError, match="NaN"):
        model.sample("a red square", steps=2)


def test_pictures_carry_what_made_them(model: LatentDiffusion, tmp_path: Any) -> None:
    prompt = 'a "red" square, 100% = $HOME {x} [y]\nzwei Äpfel 🍎'
    out = model.sample([prompt, "a green disc"], "blue", steps=2, seed=7)
    paths = out.save(tmp_path)
    assert [path.name for path in paths] == ["00000.png", "00001.png", "grid.png"]
    capsule = read_png(paths[0])
    assert (capsule["prompt"], capsule["seed"], capsule["negative_prompt"]) == (prompt, 7, "blue")
    assert (capsule["steps"], capsule["sampler"], capsule["guidance_scale"]) == (2, "ddim", 3.0)
    assert [image["seed"] for image in read_png(paths[2])["images"]] == [7, 8]


def test_callback_sees_every_step_of_every_batch(model: LatentDiffusion) -> None:
    seen: list[tuple[int, int]] = []
    model.sample(PROMPTS, steps=2, batch_size=2, callback=lambda first, i, x0: seen.append((first, i)))
    assert seen == [(0, 0), (0, 1), (2, 0), (2, 1)]


def test_a_text_tower_of_another_width_is_refused(model: LatentDiffusion) -> None:
    model.text_encoder.width = 768
    with pytest.raises(ValueError, match="16 wide, the text tower gives 768"):
        LatentDiffusion(model.unet, model.autoencoder, model.text_encoder, model.schedule)
