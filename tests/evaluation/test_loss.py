"""Loss on fixed (x, t, ε): what it hangs on, and what a paired comparison resolves."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

import ldm
from ldm.autoencoder import Autoencoder
from ldm.evaluation import compare_losses
from ldm.evaluation.loss import BINS, Losses, check_comparable, measure
from ldm.evaluation.model import pairs_of
from ldm.pipeline import LatentDiffusion
from tests.conftest import tiny_model

SAMPLES = pairs_of("emoji200", "heldout_pairs", 8)


def test_t_and_noise_hang_on_the_key_alone(model: LatentDiffusion) -> None:
    together = measure(model, SAMPLES, batch_size=8)
    apart = measure(model, SAMPLES[::-1][:5], batch_size=2)
    assert together.error.shape == (8, BINS)
    # float32 in batches of another size
    np.testing.assert_allclose(apart.error, together.error[::-1][:5], rtol=1e-4)
    assert not np.allclose(measure(model, SAMPLES, seed=1).error, together.error, rtol=0.01)


def test_the_loss_is_that_of_a_prediction_which_is_known(
    model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.unet.forward = lambda z, t, context: torch.zeros_like(z)  # type: ignore[method-assign]
    found = measure(model, SAMPLES)
    # ε is standard normal: its mean square over 64 latent values is 1, of 80 draws within four standard errors.
    assert found.error.mean() == pytest.approx(1.0, abs=4 * (2 / 64 / found.error.size) ** 0.5)
    model.unet.forward = lambda z, t, context: torch.full_like(z, torch.nan)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="NaN or infinite"):
        measure(model, SAMPLES)


def test_groups_are_styles_and_words_and_the_worst_come_first() -> None:
    error = np.arange(8.0)[:, None].repeat(BINS, 1)
    losses = Losses(error, [str(i) for i in range(BINS)], SAMPLES)
    assert losses.worst(2) == [(s.key, s.caption, e) for s, e in ((SAMPLES[7], 7.0), (SAMPLES[6], 6.0))]
    groups = {figure.name: figure for figure in losses.by_caption()}
    values = [figure.value for figure in groups.values()]
    assert values == sorted(values, reverse=True)
    for name, figure in groups.items():
        assert figure.n >= 3
        if name.startswith("style: "):
            rows = [i for i, s in enumerate(SAMPLES) if s.meta["style"] == name.removeprefix("style: ")]
            assert figure.value == np.mean(rows)
    assert [figure.value for figure in losses.by_timestep()] == [3.5] * BINS


def test_a_model_is_not_resolved_from_itself_and_is_from_its_perturbed_self() -> None:
    model = ldm.load("emoji")
    other = copy.copy(model)
    other.unet = copy.deepcopy(model.unet)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in other.unet.parameters():
            weight *= 1 + 0.1 * torch.randn(weight.shape, generator=generator)
    samples = pairs_of("emoji48", "train", 8)  # held out, eight do not resolve it
    own, again, perturbed = (measure(m, samples) for m in (model, model, other))
    assert [figure.resolved for figure in own.less(again)] == [False] * (1 + BINS)
    whole = own.less(perturbed)[0]
    assert whole.value < 0  # the perturbed one is worse
    assert whole.verdict == "resolved"
    assert whole.gain is not None
    assert whole.gain > 5  # of all 13 held-out pairs: 12 (docs/results.md)


def test_models_whose_losses_measure_different_things_are_refused() -> None:
    a = tiny_model()
    check_comparable(a, tiny_model())
    other = tiny_model(prediction="v")
    torch.manual_seed(9)
    other.autoencoder = Autoencoder(widths=(32, 64), num_blocks=1, stem=4).eval()
    with pytest.raises(ValueError, match="differ in autoencoder, prediction, so"):
        check_comparable(a, other)


def test_a_comparison_says_what_the_pairing_brings(tmp_path: Path) -> None:
    a, b = tiny_model(), tiny_model()
    with torch.no_grad():
        b.unet.conv_out.weight *= 1.01
    a.save(tmp_path / "a")
    b.save(tmp_path / "b")
    report = compare_losses(tmp_path / "a", tmp_path / "b", limit=6, command="ldm evaluate …")
    text = report.markdown()
    assert "these 6 images resolve a difference of" in text
    assert "times as much" in text
    assert "worst images" in text
    report.write(tmp_path / "out")
    assert (tmp_path / "out/report.html").is_file()
