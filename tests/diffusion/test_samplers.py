from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from ldm.diffusion import GRIDS, SAMPLERS, Flow, Grid, Schedule, choose, evaluations, make_grid
from ldm.diffusion.samplers import in_alpha, in_lambda
from ldm.randomness import normal
from tests.benchmarks.solvers import Mixture, errors, exact, ours

STOCHASTIC = ("ddpm", "euler_a", "dpmpp_2m_sde", "lcm")
SOLVERS = tuple(name for name in SAMPLERS if name not in STOCHASTIC)
MEANS = torch.tensor([[-1.0, 0.5], [1.0, 0.8], [0.2, -1.2]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
STD = 0.3


def mixture(n: int) -> Mixture:
    return Mixture(MEANS, WEIGHTS.log(), STD, normal(0, "start", 0, (n, 2)).double())


def run(name: str, grid: Grid, n: int, z: torch.Tensor | None = None, eta: float | None = None) -> torch.Tensor:
    """The sampler of a name on the mixture, from its starts unless z is given."""
    data = mixture(n)
    return SAMPLERS[name](
        lambda z, i: data.x0(z, grid.alpha[i], grid.sigma[i]),
        data.starts if z is None else z,
        grid,
        lambda i: normal(0, "step", i, (n, 2)).double(),
        **({} if eta is None else {"eta": eta}),
    )


# ------------------------------------------------------------------------------------------------------------- order


def smooth_grid(steps: int) -> Grid:
    """Log-SNRs where the mixture is smooth, the first steps short as 1/steps²: so the orders they have do not show."""
    lam = -0.5 + 2.0 * np.linspace(0.0, 1.0, steps + 1) ** 2
    alpha, sigma = 1.0 / np.sqrt(1.0 + np.exp(-2.0 * lam)), 1.0 / np.sqrt(1.0 + np.exp(2.0 * lam))
    return Grid(tuple((-lam).tolist()), tuple(alpha.tolist()), tuple(sigma.tolist()))


# UniPC's corrector sees one estimate more than its name says.
ORDERS = {"ddim": 1, "euler": 1, "heun": 2, "dpmpp_2m": 2, "dpmpp_3m": 3, "unipc": 3, "unipc_3": 4, "adams": 2,
          "adams_3": 3}  # fmt: skip


@pytest.fixture(scope="module")
def finest() -> torch.Tensor:
    return run("unipc_3", smooth_grid(640), 100)  # by its own order 5e-10 from the exact solution


@pytest.mark.parametrize(("name", "order"), ORDERS.items())
def test_samplers_converge_at_their_order(name: str, order: int, finest: torch.Tensor) -> None:
    found = [errors(run(name, smooth_grid(n), 100), finest).square().mean().sqrt().item() for n in (80, 160, 320)]
    measured = [math.log2(a / b) for a, b in pairwise(found)]
    # Where two terms of the error cancel in part, a measured order is off by some tenths.
    assert all(abs(o - order) < 0.45 for o in measured), (found, measured)


def on_the_straight_path(grid: Grid) -> Grid:
    """The same SNRs, with α + σ = 1."""
    both = [(a / (a + s), s / (a + s)) for a, s in zip(grid.alpha, grid.sigma, strict=True)]
    return Grid(grid.times, *(tuple(v) for v in zip(*both, strict=True)))  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "order"), ORDERS.items())
def test_samplers_converge_at_their_order_on_the_path_of_flow_matching(
    name: str, order: int, finest: torch.Tensor
) -> None:
    """z/α of the probability-flow ODE hangs on the SNR alone (2206.00364, eq. 1), so both paths share their ends."""
    found = []
    for n in (80, 160, 320):
        curved = smooth_grid(n)
        straight = on_the_straight_path(curved)
        z = run(name, straight, 100, mixture(100).starts * (straight.alpha[0] / curved.alpha[0]))
        found.append(errors(z * (curved.alpha[-1] / straight.alpha[-1]), finest).square().mean().sqrt().item())
    measured = [math.log2(a / b) for a, b in pairwise(found)]
    assert all(abs(o - order) < 0.45 for o in measured), (found, measured)  # as on the curved path


def test_samplers_follow_the_velocity_of_flow_matching() -> None:
    """dz/dτ = E[ε - x0 | z] (2210.02747, eq. 1), by the classical Runge-Kutta from τ = 1 to 0."""
    data, n = mixture(100), 400

    def u(z: torch.Tensor, tau: float) -> torch.Tensor:
        tau = max(tau, 1e-9)
        x0 = data.x0(z, 1.0 - tau, tau)
        return (z - x0) / tau  # ε = (z - (1 - τ) x0)/τ, less x0

    z, h = data.starts, -1.0 / n
    for i in range(n):
        tau = 1.0 - i / n
        k1 = u(z, tau)
        k2 = u(z + h / 2 * k1, tau + h / 2)
        k3 = u(z + h / 2 * k2, tau + h / 2)
        z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + u(z + h * k3, tau + h))
    for name, grid, most in (("ddim", "trailing", 2e-2), ("heun", "trailing", 2e-3), ("adams_3", "fitted", 1e-3)):
        # Of the mixture's unit scale, at 200 steps; heun and adams_3 stop short of τ = 0 by one step of Euler's.
        assert errors(run(name, make_grid(grid, 200, Flow()), 100), z).median() < most, name


def test_plms_converges_at_second_order_in_the_middle_of_the_schedule() -> None:
    # Adams-Bashforth's weights are for equal strides in time, DDIM's step is not linear in it: second order in all.
    schedule = Schedule()

    def grid(steps: int) -> Grid:
        t = torch.linspace(900.0, 200.0, steps + 1, dtype=torch.float64)
        return Grid(*(tuple(v.tolist()) for v in (t, schedule.alpha(t), schedule.sigma(t))))

    reference = run("unipc_3", grid(350), 100)
    found = [errors(run("plms", grid(n), 100), reference).mean().item() for n in (35, 70, 140)]
    assert all(1.6 < math.log2(a / b) < 2.6 for a, b in pairwise(found)), found


def test_adams_integrates_an_x0_linear_in_alpha_exactly_however_few_the_steps() -> None:
    """Gaussian data of unit variance: x̂0 = m + c α, y = z/α = m + c √(1 + σ̃²) + const σ̃."""
    whole = make_grid("fitted", 8, Schedule())
    grid = Grid(whole.times[1:8], whole.alpha[1:8], whole.sigma[1:8])  # λ from -1.9 to 1.9 in 6 steps, short of clean
    m, c = 0.7, 1.3

    def state(i: int) -> torch.Tensor:
        return torch.full((1,), grid.alpha[i] * m + c, dtype=torch.float64)  # α y: dy/dσ̃ = (y - x̂0)/σ̃

    found = {}
    for name in ("adams", "unipc"):
        z = SAMPLERS[name](lambda z, i: torch.full_like(z, m + c * grid.alpha[i]), state(0), grid, torch.zeros)
        found[name] = (z - state(grid.steps)).abs().item()
    first = Grid(grid.times[:2], grid.alpha[:2], grid.sigma[:2])
    z = SAMPLERS["ddim"](lambda z, i: torch.full_like(z, m + c * grid.alpha[i]), state(0), first, torch.zeros)
    assert (z - state(1)).abs().item() > 1e-2  # the predictor's first step is not exact: the corrector makes it so
    assert found["adams"] < 1e-13 < 1e-3 < found["unipc"], found


def test_weights_integrate_the_polynomials_they_are_made_for() -> None:
    start, end, nodes = 0.3, 1.1, (0.3, -0.4, -1.5, 1.1)
    lam = np.linspace(start, end, 200_001)
    for weights, variable in ((in_lambda, lambda x: x), (in_alpha, lambda x: 1.0 / np.sqrt(1.0 + np.exp(-2.0 * x)))):
        for count in (1, 3, 4):
            for power in range(count):
                exactly = np.trapezoid(np.exp(lam - end) * variable(lam) ** power, lam)
                found = sum(
                    b * variable(x) ** power
                    for b, x in zip(weights(start, end, nodes[:count]), np.array(nodes), strict=False)
                )
                assert found == pytest.approx(exactly, abs=1e-9), (weights.__name__, count, power)  # trapezoids: 1e-11
    assert sum(in_alpha(start, math.inf, nodes[:2])) == pytest.approx(1.0)


# ------------------------------------------------------------------------------------------------------ distributions


@pytest.mark.parametrize(
    ("name", "eta", "steps"),
    [("ddim", 0.0, 250), ("ddim", 0.5, 250), ("ddim", 1.0, 250), ("ddpm", None, 250), ("euler_a", None, 250),
     ("dpmpp_2m_sde", None, 100), ("heun", None, 40), ("adams_3", None, 40), ("plms", None, 60)],
)  # fmt: skip
@pytest.mark.parametrize("path", [Schedule(), Flow()], ids=["schedule", "flow"])
def test_samplers_draw_the_mixture_they_are_given(
    path: Schedule | Flow, name: str, eta: float | None, steps: int
) -> None:
    n = 6000
    x = run(name, make_grid("trailing", steps, path), n, eta=eta)
    nearest = (x[:, None] - MEANS).square().sum(-1).argmin(1)
    share = torch.bincount(nearest, minlength=3) / n
    # Standard errors at n = 6,000 are 0.0065 of a share and 0.013 of a coordinate's mean.
    torch.testing.assert_close(share.double(), WEIGHTS, rtol=0, atol=0.025)
    torch.testing.assert_close(x.mean(0), (WEIGHTS[:, None] * MEANS).sum(0), rtol=0, atol=0.05)
    # Standard errors of a standard deviation: 0.006 for the smallest component.
    spread = torch.stack([x[nearest == k].std(0).mean() for k in range(3)])
    torch.testing.assert_close(spread, torch.full((3,), STD, dtype=torch.float64), rtol=0, atol=0.02)


@pytest.mark.parametrize("name", ["ddpm", "euler_a"])
def test_ancestral_samplers_are_ddim_at_eta_one(name: str) -> None:
    grid = make_grid("trailing", 20, Schedule())
    assert torch.equal(run(name, grid, 10), run("ddim", grid, 10, eta=1.0))


# ---------------------------------------------------------------------------------------------------------- contract


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_of_the_ode_call_for_no_noise(name: str) -> None:
    def forbidden(i: int) -> torch.Tensor:
        raise AssertionError("noise was drawn")

    SAMPLERS[name](lambda z, i: z * 0.5, torch.randn(2, 2), make_grid("trailing", 5, Schedule()), forbidden)


@pytest.mark.parametrize("grid", sorted(GRIDS))
@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_every_sampler_runs_on_every_grid_and_tail_and_counts_its_evaluations(name: str, grid: str) -> None:
    for path in (Schedule(), Schedule(zero_terminal=True), Flow()):
        for steps, first in ((1, 0), (2, 0), (3, 1), (9, 0), (9, 4), (9, 8)):
            times = make_grid(grid, steps, path).tail(first)
            calls = []

            def denoise(z: torch.Tensor, i: int, calls: list[int] = calls, times: Grid = times) -> torch.Tensor:
                assert 0.0 <= times.times[i] <= 999.0
                assert times.sigma[i] > 0.0
                calls.append(i)
                return 0.5 * z

            z = SAMPLERS[name](denoise, torch.randn(2, 3), times, lambda i: torch.ones(2, 3))
            assert z.dtype == torch.float32
            assert torch.isfinite(z).all(), (steps, first)
            assert len(calls) == evaluations(name, times)
            assert sorted(set(calls) - {times.steps}) == list(range(times.steps))


def test_evaluations_are_one_a_step_but_for_heun_and_plms() -> None:
    grid = make_grid("trailing", 20, Schedule())
    assert {name: evaluations(name, grid) for name in SAMPLERS if evaluations(name, grid) != 20} == {
        "heun": 39,
        "plms": 21,
    }
    with pytest.raises(ValueError, match="'best' is unknown; choose one of ddpm"):
        evaluations("best", grid)


@pytest.mark.parametrize("name", SOLVERS)
def test_the_tail_of_a_grid_goes_on_from_where_it_begins(name: str) -> None:
    """From the exact state half-way, the rest of the way is at least as near as all of it."""
    schedule, grid = Schedule(), make_grid("trailing", 100, Schedule())
    whole = make_grid("trailing", 1000, schedule)
    head = Grid(whole.times[:501], whole.alpha[:501], whole.sigma[:501])
    assert head.times[-1] == grid.times[50]
    reference = exact(mixture(100), schedule)
    from_start = run(name, grid, 100)
    from_middle = run(name, grid.tail(50), 100, run("unipc_3", head, 100))
    assert errors(from_middle, reference).mean() <= 1.05 * errors(from_start, reference).mean()


@pytest.mark.parametrize("name", SOLVERS)
def test_rescaled_schedules_give_nearly_the_same_pictures(name: str) -> None:
    # α_T is 0 instead of 0.006: the exact trajectories differ by less than 1e-3 of the mixture's unit scale, for most.
    found = [run(name, make_grid("trailing", 100, Schedule(zero_terminal=z)), 300) for z in (False, True)]
    assert errors(*found).median() < 0.02


# ---------------------------------------------------------------------------------------------------------- accuracy


def test_auto_reaches_the_error_of_ddim_50_with_12_evaluations_and_half_that_of_unipc() -> None:
    schedule, found = Schedule(), {"ddim": [], "auto": [], "unipc": []}
    for components, std, seed in ((5, 0.3, 201), (20, 0.3, 202), (5, 0.05, 203), (20, 0.05, 204)):
        data = Mixture.draw(components, std, seed, starts=512)
        reference = exact(data, schedule, 300)
        for key, (sampler, grid, budget) in {
            "ddim": ("ddim", "trailing", 50),
            "auto": (*choose(12), 12),
            "unipc": ("unipc", "trailing", 12),
        }.items():
            found[key].append(errors(ours(data, schedule, sampler, grid, budget), reference))
    mean = {key: torch.cat(parts).mean().item() for key, parts in found.items()}  # steadier than the RMS of 2,048
    assert mean["auto"] < mean["ddim"], mean
    assert mean["auto"] < 0.5 * mean["unipc"], mean


@pytest.mark.parametrize("steps", [1, 4, 15, 16, 50, 1000])
def test_auto_chooses_what_there_is(steps: int) -> None:
    sampler, grid = choose(steps)
    assert sampler in SAMPLERS
    assert evaluations(sampler, make_grid(grid, steps, Schedule())) == steps


@pytest.mark.parametrize("steps", [4, 8, 12])
def test_auto_is_nearer_than_ddim_on_the_path_of_a_flow(steps: int) -> None:
    def at(name: str, grid: str, steps: int) -> torch.Tensor:
        return run(name, make_grid(grid, steps, Flow()), 100)

    there = at("ddim", "trailing", 1000)
    ours, plain = (errors(at(*how, steps), there).median() for how in (choose(steps, flow=True), ("ddim", "trailing")))
    assert ours < 0.6 * plain  # measured 0.43, 0.49 and 0.14
