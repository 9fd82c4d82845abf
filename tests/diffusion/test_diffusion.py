from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ldm.diffusion import Flow, Schedule, guided, make_path, min_snr_weight, target, to_eps, to_x0


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


def test_times_and_log_snrs_are_inverse_to_each_other() -> None:
    schedule, t = Schedule(), np.linspace(0.0, 999.0, 777)
    np.testing.assert_allclose(schedule.time(schedule.log_snr(torch.from_numpy(t)).numpy()), t, atol=1e-9)
    assert schedule.time(np.array([-99.0, 99.0])).tolist() == [999.0, 0.0]


def test_zero_terminal_leaves_no_image_at_the_last_step_and_the_first_as_it_was() -> None:
    plain = Schedule("scaled_linear", 1000, 0.00085, 0.012)
    rescaled = Schedule("scaled_linear", 1000, 0.00085, 0.012, zero_terminal=True)
    assert rescaled.alpha_bar[-1] == 0.0
    assert rescaled.log_snr(999.0) == -math.inf
    torch.testing.assert_close(rescaled.alpha_bar[0], plain.alpha_bar[0])
    # Algorithm 1 of 2305.08891: √ᾱ keeps its shape, shifted and scaled.
    shape = plain.alpha_bar.sqrt()
    torch.testing.assert_close(
        rescaled.alpha_bar.sqrt(), (shape - shape[-1]) * shape[0] / (shape[0] - shape[-1]), rtol=1e-12, atol=1e-15
    )
    t = torch.linspace(-1.0, 999.0, 5001, dtype=torch.float64)
    assert (rescaled.alpha_bar_at(t).diff() < 0).all()
    assert Schedule(**rescaled.arguments).alpha_bar.equal(rescaled.alpha_bar)


def test_the_straight_path_runs_from_image_to_noise_in_equal_steps() -> None:
    flow, t = Flow(), torch.linspace(-1.0, 999.0, 11, dtype=torch.float64)
    torch.testing.assert_close(flow.sigma(t), torch.linspace(0.0, 1.0, 11, dtype=torch.float64))
    torch.testing.assert_close(flow.alpha(t) + flow.sigma(t), torch.ones_like(t))
    assert flow.alpha(999.0) == 0.0
    assert flow.alpha_bar.dtype == torch.float64
    torch.testing.assert_close((flow.alpha_bar / (1 - flow.alpha_bar)).log(), flow.log_snr(torch.arange(1000)))
    inner = np.linspace(0.0, 998.0, 777)
    np.testing.assert_allclose(flow.time(flow.log_snr(torch.from_numpy(inner)).numpy()), inner, atol=1e-9)
    assert flow.time(np.array([-99.0, 99.0])).tolist() == [999.0, 0.0]
    for wrong in (-1.1, 999.5, math.nan):
        with pytest.raises(ValueError, match="the rule is"):
            flow.sigma(wrong)


def test_the_flow_is_the_velocity_along_the_straight_path() -> None:
    z, eps = torch.randn(2, 5, 4, dtype=torch.float64).unbind(0)
    flow, t, h = Flow(), torch.full((5,), 400.0), 1.0
    slope = (flow.add_noise(z, eps, t + h) - flow.add_noise(z, eps, t)) / (h / flow.num_steps)
    torch.testing.assert_close(slope, target("flow", z, eps, torch.tensor(0.6), torch.tensor(0.4)))


@pytest.mark.parametrize("path", [Flow(num_steps=100), Schedule("scaled_linear", 500, 1e-3, 0.01, zero_terminal=True)])
def test_a_path_is_made_again_from_its_arguments(path: Schedule | Flow) -> None:
    again = make_path(path.arguments)
    assert type(again) is type(path)
    assert torch.equal(again.alpha_bar, path.alpha_bar)


@pytest.mark.parametrize(
    ("kind", "schedule"),
    [(k, Schedule()) for k in ("epsilon", "v", "x0", "flow")] + [(k, Flow()) for k in ("x0", "flow")],
)
def test_each_prediction_gives_image_and_noise_back(kind: str, schedule: Schedule | Flow) -> None:
    t = torch.tensor([3, 500, 999])
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
    for kind in ("x0", "epsilon", "v", "flow"):
        error = target(kind, wrong, wrong_eps, alpha, sigma) - target(kind, x0, eps, alpha, sigma)  # type: ignore[arg-type]
        losses.append(min_snr_weight(snr.log(), kind, 5.0) * error**2)  # type: ignore[arg-type]
    torch.testing.assert_close(losses[0], snr.clamp(max=5) * (wrong - x0) ** 2)
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(losses[2], losses[0])
    torch.testing.assert_close(losses[3], losses[0])


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
