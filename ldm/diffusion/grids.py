"""Time grids: which times of the schedule a sampler visits. Apart from samplers, so that any goes with any.

leading, trailing and linspace visit whole times. karras, logsnr and fitted place λ = log(α/σ) and visit the real times
that have it. All but leading begin at the noisiest time, where z is taken to be standard normal: under the schedules
here a trace of the image is left (α = 0.006 at the last step of ``linear``), unless they are rescaled to none.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from ldm.diffusion.schedule import NoisePath


@dataclass(frozen=True)
class Grid:
    """Times from noise to image, with the signal and the noise at each."""

    times: tuple[float, ...]  # falling, steps + 1 of them; the last is where the sampler ends, -1 for a clean image
    alpha: tuple[float, ...]  # the signal at each time
    sigma: tuple[float, ...]  # the noise at each time

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.times) - 1

    def tail(self, first: int) -> "Grid":
        """The grid from its time ``first`` on, where image-to-image begins; at least one step is left.

        Raises:
            ValueError: for ``first`` outside 0 to steps - 1.
        """
        if not 0 <= first < self.steps:
            raise ValueError(f"first={first}: the rule is 0 to {self.steps - 1}, so that a step is left")
        return Grid(self.times[first:], self.alpha[first:], self.sigma[first:])


def leading(steps: int, schedule: NoisePath) -> np.ndarray:
    """0, k, 2k, … with k = num_steps // steps, and one added where there is room: SD 1.x's own grid.

    It begins below the noisiest step. SD's samplers end at step 0, not at a clean image.
    """
    k = schedule.num_steps // steps
    offset = 1 if (steps - 1) * k + 1 < schedule.num_steps else 0
    return np.append(np.arange(steps)[::-1] * k + offset, 0 if offset else -1)


def trailing(steps: int, schedule: NoisePath) -> np.ndarray:
    """Equal strides down from the noisiest step (Lin et al., 2305.08891, §3.3), ending at a clean image."""
    num_steps = schedule.num_steps
    return np.append(np.rint(num_steps - np.arange(steps) * num_steps / steps) - 1, -1)


def linspace(steps: int, schedule: NoisePath) -> np.ndarray:
    """Equal strides between the noisiest and the first step, both visited, ending at a clean image."""
    return np.append(np.rint(np.linspace(schedule.num_steps - 1, 0, steps)), -1)


def karras(steps: int, schedule: NoisePath, rho: float = 7.0) -> np.ndarray:
    """Equal strides in σ̃^(1/ρ), σ̃ = σ/α = e^-λ (Karras et al., 2206.00364, eq. 5), ending at a clean image.

    Args:
        steps: 1 to schedule.num_steps.
        schedule: gives the ends, σ̃ of its noisiest and of its first step.
        rho: ρ > 0; 7 is the paper's, and a larger one places more steps at low noise.
    """

    def place(low: float, high: float, n: int) -> np.ndarray:
        return -rho * np.log(np.linspace(math.exp(-low / rho), math.exp(-high / rho), n))

    return _at(schedule, steps, place)


def logsnr(steps: int, schedule: NoisePath) -> np.ndarray:
    """Equal strides in log-SNR between the noisiest and the first step, both visited, ending at a clean image."""
    return _at(schedule, steps, np.linspace)


# Density of the fitted grid over λ: highest a little above CENTRE, where samples choose between modes; it falls by e
# within RISE below and FALL above, and not under FLOOR. END: so many steps would follow the last evaluation.
CENTRE, RISE, FALL, FLOOR, END = -1.06, 0.575, 1.86, 0.068, 0.8


def fitted(steps: int, schedule: NoisePath) -> np.ndarray:
    """Times at equal quantiles of a density over λ that measures best with ``adams``, ending at a clean image.

    ρ(λ) = 1 / (e^(-(λ - c)/a) + e^((λ - c)/b)) + floor. The five numbers were fitted on Gaussian mixtures under the
    linear schedule, with and without guidance, and are reported on others (docs/samplers.md). The last evaluation, at
    quantile (steps - 1) / (steps - 1 + END), moves towards the first step of the schedule as steps grow.
    """

    def place(low: float, high: float, n: int) -> np.ndarray:
        lam = np.linspace(low, high, 4001)
        density = 1.0 / (np.exp((CENTRE - lam) / RISE) + np.exp((lam - CENTRE) / FALL)) + FLOOR
        mass = np.append(0.0, np.cumsum(density[1:] + density[:-1]))
        return np.interp(np.arange(n) / (n - 1 + END) * mass[-1], mass, lam)

    return _at(schedule, steps, place)


def _at(schedule: NoisePath, steps: int, place: Callable[[float, float, int], np.ndarray]) -> np.ndarray:
    """Times whose λ are ``place(low, high, n)``, then a clean image; the noisiest step comes first if its λ is -∞."""
    last = schedule.num_steps - 1
    endless = math.isinf(schedule.log_snr(last).item())
    low, high = (schedule.log_snr(t).item() / 2.0 for t in (last - endless, 0))
    times = schedule.time(2.0 * place(low, high, steps))
    if endless:  # in the place of the next: two so near tell a solver that extrapolates nothing but roundings
        times[0] = last
    return np.append(times, -1.0)


GRIDS: dict[str, Callable[[int, NoisePath], np.ndarray]] = {
    "leading": leading,
    "trailing": trailing,
    "linspace": linspace,
    "karras": karras,
    "logsnr": logsnr,
    "fitted": fitted,
}


def make_grid(name: str, steps: int, schedule: NoisePath, rho: float | None = None) -> Grid:
    """The grid of a name over a schedule.

    Args:
        name: a key of :data:`GRIDS`.
        steps: 1 to schedule.num_steps.
        schedule: whose times are visited.
        rho: ρ > 0 of the karras grid, 7 unless given; the others have none.

    Raises:
        ValueError: for an unknown name, steps out of range, or a ρ that the grid would ignore.
    """
    if name not in GRIDS:
        raise ValueError(f"grid={name!r} is unknown; choose one of {', '.join(GRIDS)}")
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= schedule.num_steps:
        raise ValueError(f"steps={steps}: the rule is a whole number from 1 to {schedule.num_steps}; 50 is usual")
    place = GRIDS[name]
    if rho is not None:
        if name != "karras" or not 0.0 < rho < math.inf:
            raise ValueError(f"rho={rho} with grid={name}: the rule is a number above 0, with grid=karras alone")
        place = partial(karras, rho=rho)
    times = place(steps, schedule).astype(np.float64)
    alpha, sigma = (f(torch.from_numpy(times)) for f in (schedule.alpha, schedule.sigma))
    return Grid(tuple(times.tolist()), tuple(alpha.tolist()), tuple(sigma.tolist()))
