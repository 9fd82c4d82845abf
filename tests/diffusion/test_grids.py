from __future__ import annotations

import math

import numpy as np
import pytest

from ldm.diffusion import GRIDS, Flow, Schedule, make_grid

REAL = ("karras", "logsnr", "fitted")  # grids of real times


@pytest.mark.parametrize("schedule", [Schedule(), Schedule(zero_terminal=True), Flow()], ids=["", "zero", "flow"])
@pytest.mark.parametrize("name", sorted(GRIDS))
@pytest.mark.parametrize("steps", [1, 2, 7, 50, 999, 1000])
def test_every_grid_falls_and_stays_on_the_schedule(name: str, steps: int, schedule: Schedule | Flow) -> None:
    grid = make_grid(name, steps, schedule)
    times = np.array(grid.times)
    assert grid.steps == steps
    assert (np.diff(times) < 0).all()
    assert times[0] == 999 if name != "leading" else times[0] <= 999
    assert times[-1] in (-1, 0)
    power = 1 if isinstance(schedule, Flow) else 2
    np.testing.assert_allclose(np.array(grid.alpha) ** power + np.array(grid.sigma) ** power, 1.0, rtol=1e-12)


def test_leading_grid_is_that_of_stable_diffusion() -> None:
    assert make_grid("leading", 50, Schedule()).times[:3] == (981.0, 961.0, 941.0)
    assert make_grid("leading", 50, Schedule()).times[-2:] == (1.0, 0.0)  # its final ᾱ is ᾱ_0


@pytest.mark.parametrize("rho", [None, 1.0, 3.0])
def test_karras_has_equal_strides_in_its_power_of_sigma(rho: float | None) -> None:
    grid = make_grid("karras", 20, Schedule(), rho)
    power = np.array([(s / a) ** (1 / (rho or 7.0)) for a, s in zip(grid.alpha, grid.sigma, strict=True)])[:-1]
    np.testing.assert_allclose(np.diff(power), (power[-1] - power[0]) / 19, rtol=1e-8)
    assert grid.times[0] == 999.0
    assert grid.times[-2] == pytest.approx(0.0, abs=1e-9)


def test_logsnr_has_equal_strides_in_log_snr() -> None:
    grid = make_grid("logsnr", 20, Schedule())
    lam = np.log(np.array(grid.alpha[:-1]) / np.array(grid.sigma[:-1]))
    np.testing.assert_allclose(np.diff(lam), (lam[-1] - lam[0]) / 19, rtol=1e-8)


def test_fitted_is_densest_where_modes_are_chosen_and_nears_the_first_step_as_steps_grow() -> None:
    lam = {}
    for steps in (8, 12, 50):
        grid = make_grid("fitted", steps, Schedule())
        lam[steps] = np.log(np.array(grid.alpha[:-1]) / np.array(grid.sigma[:-1]))
        shortest = np.diff(lam[steps]).argmin()
        assert -2.0 < lam[steps][shortest] < 0.0
    assert lam[8][-1] < lam[12][-1] < lam[50][-1] < Schedule().log_snr(0).item() / 2


@pytest.mark.parametrize("name", REAL)
def test_grids_over_a_rescaled_schedule_begin_without_any_image(name: str) -> None:
    grid = make_grid(name, 10, Schedule(zero_terminal=True))
    assert grid.alpha[0] == 0.0
    assert grid.alpha[1] > 0.0


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, True])
def test_steps_out_of_range_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match="from 1 to 1000"):
        make_grid("trailing", steps, Schedule())


@pytest.mark.parametrize(("name", "rho"), [("trailing", 7.0), ("karras", 0.0), ("karras", math.inf)])
def test_a_rho_that_would_be_ignored_or_means_nothing_is_refused(name: str, rho: float) -> None:
    with pytest.raises(ValueError, match="grid=karras alone"):
        make_grid(name, 10, Schedule(), rho)


def test_the_tail_of_a_grid_is_the_rest_of_it() -> None:
    grid = make_grid("fitted", 10, Schedule())
    tail = grid.tail(4)
    assert (tail.times, tail.alpha, tail.sigma) == (grid.times[4:], grid.alpha[4:], grid.sigma[4:])
    assert grid.tail(0) == grid
    for first in (-1, 10):
        with pytest.raises(ValueError, match="0 to 9"):
            grid.tail(first)


@pytest.mark.parametrize("name", ["logsnr", "fitted"])
@pytest.mark.parametrize("schedule", [Schedule(zero_terminal=True), Flow()], ids=["zero", "flow"])
def test_few_steps_are_not_spent_on_noise_alone(name: str, schedule: Schedule | Flow) -> None:
    """The first step sees no image; a second beside it would see none either, and a solver extrapolate from both."""
    times = make_grid(name, 3, schedule).times
    assert times[0] == 999.0
    assert float(schedule.alpha(times[1])) > 0.02  # beside the first: 0.001 on the flow, 6e-5 on the other
