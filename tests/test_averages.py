from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.averages import Profile, decay, exponent, overlap, reconstruct, weights_of, write

STEPS = 1000
KEPT = (0.05, 0.10)


def trajectory(steps: int = STEPS) -> np.ndarray:
    """Weights that drift, swing and shake, away from zero: (steps, 40)."""
    rng = np.random.default_rng(0)
    drift = np.sin(np.arange(steps) / 150.0)[:, None] + 3.0
    return drift + 0.02 * np.cumsum(rng.standard_normal((steps, 40)), 0) + 0.1 * rng.standard_normal((steps, 40))


def directly(theta: np.ndarray, sigma: float, step: int) -> np.ndarray:
    """The running average, as a training keeps it."""
    mean = np.zeros(theta.shape[1])
    for k in range(1, step + 1):
        beta = decay(sigma, k)
        mean = beta * mean + (1 - beta) * theta[k - 1]
    return mean


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, theta = tmp_path_factory.mktemp("averages"), trajectory()
    for step in range(100, STEPS + 1, 100):
        for sigma in KEPT:
            write(folder, Profile(sigma, step), {"w": torch.from_numpy(directly(theta, sigma, step)).float()})
    return folder


@pytest.mark.parametrize("sigma", [0.02, 0.05, 0.1, 0.25])
def test_the_exponent_gives_a_profile_of_the_named_length(sigma: float) -> None:
    s = (np.arange(200_000) + 0.5) / 200_000
    p = s ** exponent(sigma)
    p /= p.sum()
    assert math.sqrt(p @ (s - p @ s) ** 2) == pytest.approx(sigma, rel=1e-4)


def test_the_running_average_has_the_profile_of_its_power() -> None:
    # Of weights θ(s) = s/t the average is (γ + 1)/(γ + 2); steps for an integral are 1/t off.
    gamma = exponent(0.1)
    found = directly(np.arange(1, 2001)[:, None] / 2000.0, 0.1, 2000)
    assert found[0] == pytest.approx((gamma + 1) / (gamma + 2), abs=1e-3)


def test_the_overlap_of_two_profiles_is_their_integral() -> None:
    a, b = Profile(0.05, 700), Profile(0.15, 1000)
    s = (np.arange(200_000) + 0.5) / 200

    def profile(p: Profile) -> np.ndarray:
        gamma = exponent(p.sigma)
        return np.where(s <= p.step, (gamma + 1) / p.step * (s / p.step) ** gamma, 0.0)

    assert overlap(a, b) == pytest.approx(profile(a) @ profile(b) / 200, rel=1e-4)
    assert overlap(b, a) == overlap(a, b)


@pytest.mark.parametrize(("sigma", "step"), [(0.05, 1000), (0.07, 1000), (0.12, 1000), (0.15, 1000), (0.08, 600)])
def test_an_average_of_another_length_is_the_one_computed_directly(snapshots: Path, sigma: float, step: int) -> None:
    found = reconstruct(snapshots, sigma, step)["w"].double().numpy()
    expected = directly(trajectory(), sigma, step)
    nearest = min(np.abs(directly(trajectory(), kept, step) - expected).max() for kept in KEPT)
    # Half precision rounds weights near 3 by 1e-3; ten snapshots leave 1 to 3 % of a profile.
    assert np.abs(found - expected).max() < 0.015
    if sigma not in KEPT:
        assert np.abs(found - expected).max() < 0.25 * nearest


def test_weights_that_stand_still_stay_what_they_are() -> None:
    kept = [Profile(sigma, step) for step in (250, 500, 750, 1000) for sigma in KEPT]
    assert weights_of(kept, Profile(0.12, 1000)).sum() == pytest.approx(1.0, abs=1e-12)


def test_a_snapshot_is_half_precision_under_its_length_and_step(snapshots: Path) -> None:
    assert len(list(snapshots.iterdir())) == 20
    path = snapshots / "step-00000300-0.050.safetensors"
    assert path.stat().st_size < 200  # 40 numbers of 2 bytes and a header


def test_what_cannot_be_had_is_refused(snapshots: Path) -> None:
    with pytest.raises(ValueError, match=r"sigma_rel=0\.005 at step 1000 is 70% off with 20 snapshots"):
        reconstruct(snapshots, 0.005, 1000)
    with pytest.raises(ValueError, match="no averages of step 950"):
        reconstruct(snapshots, 0.07, 950)
    with pytest.raises(ValueError, match=r"0 < sigma_rel < 0\.288"):
        reconstruct(snapshots, 0.3, 1000)
