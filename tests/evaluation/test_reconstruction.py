from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from ldm.data import emoji_dataset
from ldm.evaluation import EfficientNetLite0, evaluate_autoencoder
from ldm.evaluation.reconstruction import COLUMNS, psnr, ssim
from ldm.randomness import normal


@dataclass
class FakePosterior:
    mean: Tensor
    logvar: Tensor

    def kl(self) -> Tensor:
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1 - self.logvar).flatten(1).sum(1)


class FakeAutoencoder(torch.nn.Module):
    """Keeps whole images as latents, two of its three channels; a sample is off by a fixed step, the third is dead."""

    def __init__(self, offset: float = 0.1, step: float = 0.2, broken: bool = False) -> None:
        super().__init__()
        self.place = torch.nn.Parameter(torch.zeros(1))  # says the device
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


SAMPLES = [emoji_dataset("emoji200", "heldout_pairs")[i] for i in range(20)]


def test_an_autoencoder_of_known_error_gets_its_figures() -> None:
    found, std, active, rows = evaluate_autoencoder(FakeAutoencoder(), SAMPLES, batch_size=7)
    mode, sample, ssim_, kl = (found[name] for name in COLUMNS)
    assert rows.shape == (20, 4)
    torch.testing.assert_close(
        rows.mean(0).double(), torch.tensor([each.value for each in (mode, sample, ssim_, kl)]).double()
    )
    assert mode.n == 20
    assert mode.value == pytest.approx(10 * math.log10(4 / 0.1**2), abs=0.01)
    # A sample is the mode 0.2 brighter, less 0.1 towards grey, where white clips: between 1 / 0.3² and 1 / 0.05²
    assert 10 * math.log10(4 / 0.3**2) < sample.value < mode.value + 6.1
    assert sample.value != mode.value
    assert 0.5 < ssim_.low < ssim_.value < ssim_.high < 1
    assert 0.5 < active <= 2 / 3  # the third channel is dead, and some corners are always white
    assert len(std) == 3
    assert kl.value > 0


def test_figures_do_not_depend_on_the_batch_size() -> None:
    one, other = (evaluate_autoencoder(FakeAutoencoder(), SAMPLES[:10], size) for size in (3, 10))
    for name, figure in one[0].items():
        assert figure.value == pytest.approx(other[0][name].value, rel=1e-5), name
    torch.testing.assert_close(one[1], other[1])


def test_kl_a_unit_is_that_of_the_posterior() -> None:
    class Shifted(FakeAutoencoder):
        def posterior(self, x: Tensor) -> FakePosterior:
            return FakePosterior(torch.full_like(x, 3.0), torch.full_like(x, -2.0))

    found, _, active, _ = evaluate_autoencoder(Shifted(), SAMPLES[:4], 4)
    assert found["KL a unit (nats)"].value == pytest.approx(0.5 * (9 + math.exp(-2) - 1 + 2))
    assert active == 0.0  # far from the prior, yet it says nothing of the image


def test_set_distances_grow_with_the_error_of_reconstructions(network: EfficientNetLite0) -> None:
    near, far = (evaluate_autoencoder(FakeAutoencoder(offset), SAMPLES, 10, network)[0] for offset in (0.02, 0.5))
    assert near["rFD-EffNet"].note == "n=20 < 2048: biased upwards"
    assert 0 <= near["rFD-EffNet"].value < 0.2 * far["rFD-EffNet"].value
    assert near["rKID-EffNet"].value < far["rKID-EffNet"].value
    assert "rFD-EffNet" not in evaluate_autoencoder(FakeAutoencoder(), SAMPLES[:3], 3, network)[0]  # too few


def test_a_broken_autoencoder_is_an_error_not_a_figure() -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        evaluate_autoencoder(FakeAutoencoder(broken=True), SAMPLES[:4], 4)
