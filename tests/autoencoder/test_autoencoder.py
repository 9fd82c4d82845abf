from __future__ import annotations

import math

import pytest
import torch

from ldm.autoencoder import Autoencoder, CalibratedLoss, Posterior


def tiny() -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(widths=(32, 64), num_blocks=1, stem=4).eval()


def test_sd_autoencoder_has_exactly_83653863_parameters() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in Autoencoder().parameters()) == 83_653_863


@pytest.mark.parametrize(("widths", "stem"), [((32, 32, 32, 32), 1), ((32, 32, 32), 2), ((32, 32), 4)])
def test_every_stem_shrinks_by_eight_and_gives_the_size_back(widths: tuple[int, ...], stem: int) -> None:
    autoencoder = Autoencoder(widths=widths, num_blocks=1, stem=stem)
    z = autoencoder.encode(torch.zeros(1, 3, 40, 24))
    assert z.shape == (1, 4, 5, 3)
    assert autoencoder.decode(z).shape == (1, 3, 40, 24)


def test_decode_takes_the_scaled_latents_that_encode_gives() -> None:
    autoencoder, x = tiny(), torch.rand(2, 3, 16, 16)
    raw = autoencoder.posterior(x).mode()
    autoencoder.set_latent_scale(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.5, 1.0, 2.0, 4.0]))
    z = autoencoder.encode(x)
    torch.testing.assert_close(z[:, 3], (raw[:, 3] - 4.0) / 4.0)
    torch.testing.assert_close(autoencoder.decode(z), autoencoder.decode_raw(raw), rtol=1e-5, atol=1e-5)


def test_encoding_is_the_mode_unless_a_generator_is_given() -> None:
    autoencoder, x = tiny(), torch.rand(1, 3, 16, 16)
    assert torch.equal(autoencoder.encode(x), autoencoder.encode(x))
    drawn = [autoencoder.encode(x, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], autoencoder.encode(x))


def test_kl_of_a_posterior_matches_torch_distributions() -> None:
    posterior = Posterior(torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3))
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(posterior.mean, posterior.std), normal(0.0, 1.0))
    torch.testing.assert_close(posterior.kl(), expected.flatten(1).sum(1))


@pytest.mark.parametrize("likelihood", ["gaussian", "laplace"])
def test_loss_is_the_negative_log_likelihood_plus_beta_kl_a_pixel_value(likelihood: str) -> None:
    x, y = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    posterior = Posterior(torch.randn(2, 4, 1, 1), torch.randn(2, 4, 1, 1))
    loss = CalibratedLoss(0.18, likelihood)  # type: ignore[arg-type]
    scale = math.exp(loss.log_scale.item())
    kind = torch.distributions.Normal if likelihood == "gaussian" else torch.distributions.Laplace
    nll = -kind(y, scale).log_prob(x).flatten(1).sum(1)
    expected = ((nll + 0.18 * posterior.kl()) / (3 * 8 * 8)).mean()
    torch.testing.assert_close(loss(x, y, posterior)["loss"], expected)


def test_learned_scale_settles_at_the_root_mean_square_error() -> None:
    loss = CalibratedLoss()
    x, y = torch.zeros(4, 3, 8, 8), torch.randn(4, 3, 8, 8) * 0.3
    posterior = Posterior(torch.zeros(4, 4, 1, 1), torch.zeros(4, 4, 1, 1))
    adam = torch.optim.Adam(loss.parameters(), 0.05)
    for _ in range(300):
        adam.zero_grad()
        loss(x, y, posterior)["loss"].backward()
        adam.step()
    assert loss.log_scale.exp().item() == pytest.approx(y.square().mean().sqrt().item(), rel=1e-3)


@pytest.mark.parametrize("shape", [(1, 3, 12, 16), (3, 16, 16), (1, 1, 16, 16)])
def test_images_of_the_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="multiples of 8"):
        tiny().posterior(torch.zeros(shape))


def test_settings_that_do_not_shrink_by_eight_are_refused() -> None:
    with pytest.raises(ValueError, match="shrinks by 4"):
        Autoencoder(widths=(32, 32), stem=2)
    with pytest.raises(ValueError, match="multiple of 32"):
        Autoencoder(widths=(32, 40), stem=4)


def test_a_latent_scale_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        tiny().set_latent_scale(torch.zeros(4), torch.tensor([1.0, 0.0, 1.0, 1.0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_latent_scale_is_exact_in_every_precision(dtype: torch.dtype) -> None:
    autoencoder = Autoencoder(widths=(32, 64), num_blocks=1, stem=4)
    std = torch.full((4,), 1 / 0.18215)
    autoencoder.set_latent_scale(torch.zeros(4), std)
    z = autoencoder.to(dtype).normalise(torch.ones(1, 4, 2, 2, dtype=dtype))
    assert torch.equal(autoencoder.latent_std, std)
    assert z.dtype == dtype
    assert autoencoder.decode(z).dtype == dtype
