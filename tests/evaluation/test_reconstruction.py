from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from ldm.evaluation import evaluate_autoencoder
from ldm.evaluation.reconstruction import psnr, ssim
from ldm.randomness import normal


@dataclass
class FakePosterior:
    mean: Tensor
    logvar: Tensor

    def kl(self) -> Tensor:
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1 - self.logvar).flatten(1).sum(1)


class FakeAutoencoder:
    """Keeps whole images as latents, two of its three channels; a sample is off by a fixed step, the third is dead."""

    def __init__(self, offset: float = 0.1, step: float = 0.2, broken: bool = False) -> None:
        self.offset, self.step, self.broken = offset, step, broken

    def posterior(self, x: Tensor) -> FakePosterior:
        mean = torch.stack([x[:, 0], x[:, 1], torch.zeros_like(x[:, 2])], 1)
        mean = mean * math.nan if self.broken else mean
        return FakePosterior(mean, torch.zeros_like(mean))

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return x / 2 + (0.0 if generator is None else self.step / 2)

    def decode(self, z: Tensor) -> Tensor:
        x = 2 * z
        # Towards grey, so that the clamp to [-1, 1] takes nothing away.
        return x - self.offset * torch.where(x > 0, 1.0, -1.0)


def test_psnr_of_a_known_error_is_its_closed_form() -> None:
    x = normal(0, "x", 0, (3, 3, 16, 16)).clamp(-0.5, 0.5)
    error = torch.tensor([0.02, 0.1, 0.4])
    expected = 10 * torch.log10(4 / error**2)
    torch.testing.assert_close(psnr(x + error[:, None, None, None], x), expected)
    assert psnr(x, x).isinf().all()


def test_decoded_pixels_beyond_the_range_are_clamped_as_in_a_file() -> None:
    x = torch.ones(1, 3, 16, 16)
    torch.testing.assert_close(psnr(x - 0.1, x), psnr(torch.where(x > 0, 0.9, 3.0), x))
    assert psnr(x + 5, x).isinf().all()


def test_ssim_is_one_for_a_copy_and_falls_with_noise() -> None:
    x = normal(1, "x", 0, (2, 3, 32, 32)).clamp(-1, 1)
    noise = normal(2, "noise", 0, (2, 3, 32, 32))
    torch.testing.assert_close(ssim(x, x), torch.ones(2))
    assert (ssim(x + 0.1 * noise, x) > ssim(x + 0.5 * noise, x)).all()
    assert ssim(x, x).shape == (2,)  # one an image


def test_an_autoencoder_of_known_error_gets_its_figures() -> None:
    result = evaluate_autoencoder(FakeAutoencoder(), "emoji200", ("heldout_pairs",), batch_size=7, limit=20)
    found = result["heldout_pairs"]
    assert found["num_images"] == 20
    assert found["psnr"] == pytest.approx(10 * math.log10(4 / 0.1**2), abs=0.01)
    # A sample is the mode 0.2 brighter, less 0.1 towards grey, where white clips: between 1 / 0.3² and 1 / 0.05²
    assert 10 * math.log10(4 / 0.3**2) < found["psnr_sample"] < found["psnr"] + 6.1
    assert found["psnr_sample"] != found["psnr"]
    assert 0.5 < found["ssim"] < 1
    assert 0.5 < found["active_units"] <= 2 / 3  # the third channel is dead, and some corners are always white
    assert len(found["latent_std"]) == len(found["latent_mean"]) == 3
    assert found["kl_per_unit"] > 0


def test_figures_do_not_depend_on_the_batch_size() -> None:
    one = evaluate_autoencoder(FakeAutoencoder(), "emoji200", ("heldout_pairs",), 3, 10)["heldout_pairs"]
    other = evaluate_autoencoder(FakeAutoencoder(), "emoji200", ("heldout_pairs",), 10, 10)["heldout_pairs"]
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value == pytest.approx(other[name], rel=1e-5), name


def test_kl_a_unit_is_that_of_the_posterior() -> None:
    class Shifted(FakeAutoencoder):
        def posterior(self, x: Tensor) -> FakePosterior:
            return FakePosterior(torch.full_like(x, 3.0), torch.full_like(x, -2.0))

    found = evaluate_autoencoder(Shifted(), "emoji200", ("heldout_pairs",), 4, 4)["heldout_pairs"]
    assert found["kl_per_unit"] == pytest.approx(0.5 * (9 + math.exp(-2) - 1 + 2))
    assert found["active_units"] == 0.0  # far from the prior, yet it says nothing of the image


def test_a_broken_autoencoder_is_an_error_not_a_figure() -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        evaluate_autoencoder(FakeAutoencoder(broken=True), "emoji200", ("heldout_pairs",), 4, 4)


def test_invalid_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="limit=0"):
        evaluate_autoencoder(FakeAutoencoder(), "emoji200", ("heldout_pairs",), 4, 0)
    with pytest.raises(ValueError, match="heldout_concepts"):
        evaluate_autoencoder(FakeAutoencoder(), "emoji200", ("heldout_concepts",), 4, 4)
