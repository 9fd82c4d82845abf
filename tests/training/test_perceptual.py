"""The perceptual term of stage one, and the posterior that collapses."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm import checkpoint
from ldm.cli import door, train
from ldm.data import FixedSet, emoji_dataset
from ldm.training.perceptual import LiteDistance, Perceptual
from tests.training.test_training import AUTOENCODER, arguments, column


@pytest.fixture(scope="module")
def lite() -> LiteDistance:
    return LiteDistance()


@pytest.fixture(scope="module")
def x() -> Tensor:
    """Four emoji, 128×128."""
    items = FixedSet(emoji_dataset("emoji48").subset(range(4)), 128, 128)
    return torch.stack([items[i]["image"] for i in range(4)])


def test_the_distance_is_equation_1_of_lpips(x: Tensor) -> None:
    class Maps(nn.Module):
        def maps(self, pixels: Tensor) -> list[Tensor]:
            return [pixels - 100.0, F.avg_pool2d(pixels, 4)]

    distance = LiteDistance()
    distance.network = Maps()  # type: ignore[assignment]
    x0 = x.flip(0)
    expected = torch.zeros(4, dtype=torch.float64)
    for a, b in zip(*(Maps().maps((image.double() + 1.0) * 127.5) for image in (x, x0)), strict=True):
        _, _, height, width = a.shape
        for n in range(4):
            unit = [y[n] / y[n].square().sum(0).sqrt() for y in (a, b)]
            expected[n] += (unit[0] - unit[1]).square().sum() / (height * width)
    torch.testing.assert_close(distance(x, x0).double(), expected, rtol=1e-5, atol=1e-7)  # float32 against float64


def test_the_distance_is_zero_of_itself_and_grows_with_blur(lite: LiteDistance, x: Tensor) -> None:
    assert float(lite(x, x).abs().max()) == 0.0
    blurred = [F.interpolate(F.avg_pool2d(x, k), scale_factor=k, mode="bilinear") for k in (2, 4, 8)]
    distances = torch.stack([lite(each, x) for each in blurred])  # (3, n)
    assert bool((distances.diff(dim=0) > 0).all())


def test_blur_is_farther_than_a_shade_of_the_same_squared_error(lite: LiteDistance, x: Tensor) -> None:
    """What the term is for: the likelihood calls both alike."""
    blurred = F.interpolate(F.avg_pool2d(x, 4), scale_factor=4, mode="bilinear")
    shade = x - (blurred - x).square().mean((1, 2, 3), keepdim=True).sqrt()
    assert bool((lite(blurred, x) > 2 * lite(shade, x)).all())


def test_the_gradient_reaches_the_reconstruction_and_nothing_else(lite: LiteDistance, x: Tensor) -> None:
    moved = (x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).requires_grad_()
    before = lite(moved, x).sum()
    before.backward()
    assert moved.grad is not None
    assert bool(moved.grad.isfinite().all())
    assert all(parameter.grad is None for parameter in lite.parameters())
    step = 1e-3 * before.item() / float(moved.grad.square().sum())  # first order: 1e-3 of the distance
    after = lite((moved - step * moved.grad).detach(), x).sum()
    assert 0.5e-3 < float(1.0 - after / before.detach()) < 2e-3


def test_flat_images_have_finite_gradients(lite: LiteDistance) -> None:
    flat = torch.ones(1, 3, 32, 32, requires_grad=True)  # activations of length 0 are divided by their length
    lite(flat, torch.ones(1, 3, 32, 32)).sum().backward()
    assert flat.grad is not None
    assert bool(flat.grad.isfinite().all())


def test_a_training_with_it_is_logged_resumed_and_keeps_no_frozen_network(shapes: Path, tmp_path: Path) -> None:
    quiet = ("samples.every=0", "validation.every=1000", "checkpoint.every=3", "optimizer.decay=constant")
    own = (*AUTOENCODER, "perceptual=features", *quiet)
    for name, steps in (("whole", 20), ("parts", 9)):
        assert door(train, arguments(shapes, tmp_path / name, "autoencoder", steps, *own)) == 0
    assert door(train, [f"resume={tmp_path / 'parts'}", "trainer.max_steps=20"]) == 0
    assert min(column(tmp_path / "whole", "train/perceptual")) > 0.0
    states = [checkpoint.read_state(checkpoint.newest(tmp_path / name)) for name in ("whole", "parts")]
    assert sorted(states[0]["rest"]) == ["loss.log_scale"]
    for one, other in zip(*(state["optimizer_states"][0]["state"].values() for state in states), strict=True):
        torch.testing.assert_close(one["exp_avg"], other["exp_avg"], rtol=0, atol=0)


def test_a_weight_of_0_gives_the_losses_of_none(shapes: Path, tmp_path: Path) -> None:
    losses = []
    for own in ((), ("perceptual=features", "perceptual.weight=0")):
        run = tmp_path / str(len(own))
        assert door(train, arguments(shapes, run, "autoencoder", 10, *AUTOENCODER, "samples.every=0", *own)) == 0
        losses.append(column(run, "train/loss"))
    assert losses[0] == losses[1]


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is there")
def test_lpips_without_torchvision_is_one_line(shapes: Path, tmp_path: Path, capsys: Any) -> None:
    own = ("perceptual=features", "perceptual.network=vgg")
    assert door(train, arguments(shapes, tmp_path / "run", "autoencoder", 1, *AUTOENCODER, *own)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "perceptual.network=vgg is not to be had" in error
    assert "torchvision" in error


def test_lpips_is_the_network_of_torchmetrics(monkeypatch: pytest.MonkeyPatch, x: Tensor) -> None:
    class Net(nn.Module):
        def forward(self, one: Tensor, other: Tensor) -> Tensor:
            return (one - other).square().mean((1, 2, 3), keepdim=True)

    class Metric:
        def __init__(self, net_type: str) -> None:
            assert net_type == "vgg"
            self.net = Net()

    monkeypatch.setattr("ldm.training.perceptual.LearnedPerceptualImagePatchSimilarity", Metric)
    assert float(Perceptual("vgg", 2.0)(x, x + 0.5)) == pytest.approx(0.5)


@pytest.mark.parametrize(("network", "weight"), [("alex", 1.0), ("effnet", -1.0), ("effnet", float("nan"))])
def test_other_settings_are_refused(network: Any, weight: float) -> None:
    with pytest.raises(ValueError, match="effnet or vgg, and a finite weight >= 0"):
        Perceptual(network, weight)


# -------------------------------------------------------------------------------------------------------- collapse


@pytest.mark.parametrize("beta", [0.18, 1000])
def test_a_posterior_that_collapses_is_said_and_one_that_does_not_is_not(
    shapes: Path, tmp_path: Path, capsys: Any, beta: float
) -> None:
    own = (*AUTOENCODER, f"loss.beta={beta}", "samples.every=0", "validation.images=24")
    assert door(train, arguments(shapes, tmp_path, "autoencoder", 100, *own)) == 0
    shares, error = column(tmp_path, "val/active_units"), capsys.readouterr().err
    events = tmp_path / "events.jsonl"
    if beta < 1:
        assert min(shares) > 0.3  # measured 0.84 and 0.88; the corners of the shapes are always white
        assert not events.exists()
        assert "active" not in error
    else:
        assert shares[-1] < 0.05
        last = json.loads(events.read_text().splitlines()[-1])
        assert (last["event"], last["step"]) == ("collapse", 100)
        assert float(last["active_units"]) == pytest.approx(shares[-1])
        assert "the posterior collapses; lower loss.beta" in error
