"""Whole trajectories beside diffusers' schedulers, on a denoiser that is known, where the definitions coincide.

diffusers keeps σ̃ and most states in float32; the tolerance is what that leaves over some dozen steps.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ldm.diffusion import SAMPLERS, Grid, Schedule, make_grid
from ldm.diffusion.samplers import in_lambda
from tests.benchmarks.solvers import Mixture

diffusers = pytest.importorskip("diffusers")

OWN = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
DATA = Mixture.draw(5, 0.3, 7, starts=32, dim=4)


def noise(i: int) -> torch.Tensor:
    return torch.randn(DATA.starts.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)


def ours(name: str, grid: Grid) -> torch.Tensor:
    return SAMPLERS[name](lambda z, i: DATA.x0(z, grid.alpha[i], grid.sigma[i]), DATA.starts, grid, noise)


def theirs(scheduler: Any, steps: int, monkeypatch: pytest.MonkeyPatch, in_y: bool = False) -> torch.Tensor:
    """A scheduler's end. ``in_y``: its samples are y = z/α. Its noise is the step's own."""
    step = 0
    module = __import__(type(scheduler).__module__, fromlist=["randn_tensor"])
    if "randn_tensor" in vars(module):
        monkeypatch.setattr(module, "randn_tensor", lambda *shape, **rest: noise(step))
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.double().tolist() if "sigmas" in vars(scheduler) else None
    z = DATA.starts.clone()
    if in_y:
        z = z * math.hypot(1.0, sigmas[0])
    for step, t in enumerate(scheduler.timesteps):
        # σ̃ as the scheduler has it; DDPM's, DDIM's and PNDM's are those of the whole time.
        alpha_bar = scheduler.alphas_cumprod[int(t)].double().item() if sigmas is None else 1 / (1 + sigmas[step] ** 2)
        alpha, sigma = math.sqrt(alpha_bar), math.sqrt(1.0 - alpha_bar)
        x0 = DATA.x0(z * alpha if in_y else z, alpha, sigma)
        output = x0
        if scheduler.config.prediction_type == "epsilon":
            output = ((z * alpha if in_y else z) - alpha * x0) / sigma
        z = scheduler.step(output, t, z).prev_sample
    return z


CASES = [  # our sampler, our grid, their scheduler, its settings, whether its samples are y
    ("ddim", "leading", "DDIMScheduler", {"clip_sample": False, "steps_offset": 1, "set_alpha_to_one": False}, False),
    ("ddim", "trailing", "DDIMScheduler", {"clip_sample": False, "timestep_spacing": "trailing"}, False),
    ("ddpm", "trailing", "DDPMScheduler", {"clip_sample": False, "timestep_spacing": "trailing"}, False),
    ("plms", "leading", "PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}, False),
    ("euler", "trailing", "EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, True),
    ("euler_a", "trailing", "EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}, True),
    ("heun", "trailing", "HeunDiscreteScheduler", {"timestep_spacing": "trailing"}, True),
    ("dpmpp_2m", "trailing", "DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}, False),
    ("dpmpp_2m", "karras", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, False),
    ("dpmpp_2m_sde", "trailing", "DPMSolverMultistepScheduler",
     {"timestep_spacing": "trailing", "algorithm_type": "sde-dpmsolver++"}, False),
    ("unipc", "trailing", "UniPCMultistepScheduler", {"timestep_spacing": "trailing"}, False),
    ("unipc", "karras", "UniPCMultistepScheduler", {"use_karras_sigmas": True}, False),
    ("unipc_3", "trailing", "UniPCMultistepScheduler", {"timestep_spacing": "trailing", "solver_order": 3}, False),
]  # fmt: skip


@pytest.mark.parametrize(("name", "grid", "scheduler", "settings", "in_y"), CASES)
def test_trajectories_are_those_of_diffusers(
    name: str, grid: str, scheduler: str, settings: dict[str, Any], in_y: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 20
    # These two know no x̂0; where it is known, it is given, since ε at low noise loses digits in float32.
    kind = {} if scheduler in ("PNDMScheduler", "EulerAncestralDiscreteScheduler") else {"prediction_type": "sample"}
    made = getattr(diffusers, scheduler)(**OWN, **settings, **kind)
    expected = theirs(made, steps, monkeypatch, in_y)
    # float32 of σ̃ and of the state: 1e-6 a step of states up to 4, and a factor of 10 where trajectories part.
    torch.testing.assert_close(ours(name, make_grid(grid, steps, Schedule())), expected.double(), rtol=0, atol=3e-4)


def test_consistency_sampling_is_that_of_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    times = [999, 759, 499, 259, 0]  # at 0 the boundary condition makes it the identity
    schedule, scheduler = Schedule(), diffusers.LCMScheduler(**OWN, prediction_type="sample")
    scheduler.set_timesteps(timesteps=times)
    t = torch.tensor([*times, -1], dtype=torch.float64)
    grid = Grid(*(tuple(v.tolist()) for v in (t, schedule.alpha(t), schedule.sigma(t))))
    z = DATA.starts
    for i in range(5):
        monkeypatch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *a, i=i, **k: noise(i))
        z = scheduler.step(DATA.x0(z, grid.alpha[i], grid.sigma[i]), times[i], z).prev_sample
    torch.testing.assert_close(ours("lcm", grid), z, rtol=0, atol=1e-4)  # its ᾱ are float32


def test_the_3m_of_diffusers_takes_half_of_the_second_difference() -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(**OWN, solver_order=3, prediction_type="sample")
    scheduler.set_timesteps(20)
    scheduler._step_index = 12
    lam = [-math.log(s) for s in scheduler.sigmas[10:14].double().tolist()]
    # The part of x̂0 that a straight line through the last two estimates does not have, of weight 1: (λ - λ_0)².
    estimates = [torch.full((1,), (x - lam[2]) ** 2, dtype=torch.float64) for x in lam[:3]]
    z = torch.zeros(1, dtype=torch.float64)
    alpha = 1.0 / math.hypot(1.0, math.exp(-lam[3]))
    found = scheduler.multistep_dpm_solver_third_order_update(estimates, sample=z).item() / alpha
    h = lam[3] - lam[2]
    exactly = h * h - 2.0 * h + 2.0 - 2.0 * math.exp(-h)  # ∫ e^(λ - end) (λ - λ_0)² dλ
    ours = sum(b * x.item() for b, x in zip(in_lambda(lam[2], lam[3], lam[2::-1]), estimates[::-1], strict=True))
    assert ours == pytest.approx(exactly, rel=1e-9)
    assert found == pytest.approx(exactly / 2.0, rel=1e-4)  # its σ̃ are float32
