from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from ldm.diffusion import GRIDS, SAMPLERS, Schedule, guided, make_grid, min_snr_weight, target, to_eps, to_x0
from ldm.randomness import normal


@pytest.mark.parametrize(
    ("name", "start", "end", "power"), [("linear", 1e-4, 0.02, 1.0), ("scaled_linear", 0.00085, 0.012, 2.0)]
)
def test_alpha_bar_is_the_product_of_the_formula(name: str, start: float, end: float, power: float) -> None:
    schedule = Schedule(name, 1000, start, end)  # type: ignore[arg-type]
    product, expected = 1.0, []
    for i in range(1000):
        beta = (start ** (1 / power) + i / 999 * (end ** (1 / power) - start ** (1 / power))) ** power
        product *= 1.0 - beta
        expected.append(product)
    assert schedule.alpha_bar.dtype == torch.float64
    np.testing.assert_allclose(schedule.alpha_bar.numpy(), expected, rtol=1e-12)


def test_linear_schedule_ends_at_the_published_noise() -> None:
    assert Schedule().alpha_bar[-1].item() == pytest.approx(4.036e-5, rel=1e-3)  # DDPM's: not zero


def test_real_times_go_through_the_whole_steps_and_fall_between_them() -> None:
    schedule = Schedule()
    t = torch.linspace(-1.0, 999.0, 5001, dtype=torch.float64)
    alpha_bar = schedule.alpha_bar_at(t)
    assert (alpha_bar.diff() < 0).all()
    assert torch.equal(schedule.alpha_bar_at(torch.arange(1000)), schedule.alpha_bar)
    assert schedule.alpha_bar_at(-1.0).item() == 1.0
    torch.testing.assert_close(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, torch.ones_like(t))
    torch.testing.assert_close(schedule.log_snr(t[10:]), (alpha_bar / (1 - alpha_bar)).log()[10:])


@pytest.mark.parametrize("t", [-1.1, 999.5, math.nan])
def test_times_outside_the_schedule_are_refused(t: float) -> None:
    with pytest.raises(ValueError, match="the rule is"):
        Schedule().alpha_bar_at(t)


@pytest.mark.parametrize("kind", ["epsilon", "v", "x0"])
def test_each_prediction_gives_image_and_noise_back(kind: str) -> None:
    schedule, t = Schedule(), torch.tensor([3, 500, 999])
    z, eps = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64).unbind(0)
    alpha, sigma = (f(t)[:, None, None, None] for f in (schedule.alpha, schedule.sigma))
    z_t = schedule.add_noise(z, eps, t)
    prediction = target(kind, z, eps, alpha, sigma)  # type: ignore[arg-type]
    torch.testing.assert_close(to_x0(kind, prediction, z_t, alpha, sigma), z)  # type: ignore[arg-type]
    torch.testing.assert_close(to_eps(kind, prediction, z_t, alpha, sigma), eps)  # type: ignore[arg-type]


def test_min_snr_weighs_the_same_error_of_x0_whatever_is_predicted() -> None:
    snr = torch.tensor([0.1, 1.0, 5.0, 100.0], dtype=torch.float64)
    alpha, sigma = (snr / (1 + snr)).sqrt(), (1 / (1 + snr)).sqrt()
    x0, eps, wrong = torch.randn(3, 4, dtype=torch.float64).unbind(0)
    z = alpha * x0 + sigma * eps
    wrong_eps = (z - alpha * wrong) / sigma
    losses = []
    for kind in ("x0", "epsilon", "v"):
        error = target(kind, wrong, wrong_eps, alpha, sigma) - target(kind, x0, eps, alpha, sigma)  # type: ignore[arg-type]
        losses.append(min_snr_weight(snr.log(), kind, 5.0) * error**2)  # type: ignore[arg-type]
    torch.testing.assert_close(losses[0], snr.clamp(max=5) * (wrong - x0) ** 2)
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(losses[2], losses[0])


def test_guidance_extrapolates_from_negative_to_positive_and_makes_one_pass_at_one() -> None:
    batches = []

    def unet(z: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        batches.append(len(z))
        return context[:, :1].expand_as(z)

    positive, negative, z = torch.full((2, 3), 5.0), torch.full((2, 3), 2.0), torch.zeros(2, 4)
    assert guided(unet, positive, negative, 7.5)(z, torch.zeros(2)).unique().tolist() == [2.0 + 7.5 * 3.0]
    assert guided(unet, positive, negative, 0.0)(z, torch.zeros(2)).unique().tolist() == [2.0]
    assert guided(unet, positive, None, 1.0)(z, torch.zeros(2)).unique().tolist() == [5.0]
    assert batches == [4, 4, 2]


@pytest.mark.parametrize("name", sorted(GRIDS))
@pytest.mark.parametrize("steps", [1, 2, 7, 50, 999, 1000])
def test_every_grid_falls_and_stays_on_the_schedule(name: str, steps: int) -> None:
    grid = make_grid(name, steps, Schedule())
    times = np.array(grid.times)
    assert grid.steps == steps
    assert (np.diff(times) < 0).all()
    assert times[0] <= 999
    assert times[-1] in (-1, 0)


def test_leading_grid_is_that_of_stable_diffusion() -> None:
    assert make_grid("leading", 50, Schedule()).times[:3] == (981.0, 961.0, 941.0)
    assert make_grid("leading", 50, Schedule()).times[-2:] == (1.0, 0.0)  # its final ᾱ is ᾱ_0


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, True])
def test_steps_out_of_range_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match="from 1 to 1000"):
        make_grid("trailing", steps, Schedule())


# ------------------------------------------------------------ samplers, on a Gaussian mixture whose score is known

MEANS = torch.tensor([[-1.0, 0.5], [1.0, 0.8], [0.2, -1.2]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
STD = 0.3


def exact_x0(z: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
    """E[x0 | z] under the mixture: z of component k is N(α μ_k, α² s² + σ²)."""
    variance = alpha**2 * STD**2 + sigma**2
    shift = z[:, None] - alpha * MEANS  # (n, k, 2)
    posterior = torch.softmax(WEIGHTS.log() - shift.square().sum(-1) / (2 * variance), dim=1)  # (n, k)
    means = MEANS + alpha * STD**2 / variance * shift
    return (posterior[..., None] * means).sum(1)


def run(name: str, steps: int, n: int, eta: float | None = None) -> torch.Tensor:
    grid = make_grid("trailing", steps, Schedule())
    settings = {} if eta is None else {"eta": eta}
    return SAMPLERS[name](
        lambda z, i: exact_x0(z, grid.alpha[i], grid.sigma[i]),
        normal(0, "start", 0, (n, 2)).double(),
        grid,
        lambda i: normal(0, "step", i, (n, 2)).double(),
        **settings,
    )


def test_ddim_converges_at_first_order_on_a_gaussian_mixture() -> None:
    reference = run("ddim", 1000, 500)
    errors = [(run("ddim", steps, 500) - reference).square().mean().sqrt().item() for steps in (25, 50, 100)]
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert all(0.8 < order < 1.4 for order in orders), (errors, orders)  # measured against 1,000 steps, itself inexact


@pytest.mark.parametrize(("name", "eta"), [("ddim", 0.0), ("ddim", 0.5), ("ddim", 1.0), ("ddpm", None)])
def test_samplers_draw_the_mixture_they_are_given(name: str, eta: float | None) -> None:
    n = 6000
    x = run(name, 250, n, eta)
    nearest = (x[:, None] - MEANS).square().sum(-1).argmin(1)
    share = torch.bincount(nearest, minlength=3) / n
    # Standard errors at n = 6,000 are 0.0065 of a share and 0.013 of a coordinate's mean.
    torch.testing.assert_close(share.double(), WEIGHTS, rtol=0, atol=0.025)
    torch.testing.assert_close(x.mean(0), (WEIGHTS[:, None] * MEANS).sum(0), rtol=0, atol=0.05)
    # Standard errors of a standard deviation: 0.006 for the smallest component; measured 0.291 to 0.303.
    spread = torch.stack([x[nearest == k].std(0).mean() for k in range(3)])
    torch.testing.assert_close(spread, torch.full((3,), STD, dtype=torch.float64), rtol=0, atol=0.02)


def test_ddpm_is_ddim_at_eta_one() -> None:
    assert torch.equal(run("ddpm", 20, 10), run("ddim", 20, 10, eta=1.0))


def test_ddim_follows_the_ode_and_calls_for_no_noise() -> None:
    grid = make_grid("trailing", 5, Schedule())

    def forbidden(i: int) -> torch.Tensor:
        raise AssertionError("noise was drawn")

    SAMPLERS["ddim"](lambda z, i: z * 0.5, torch.randn(2, 2), grid, forbidden)
