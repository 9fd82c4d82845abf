"""Time grids: which times of the schedule a sampler visits. Apart from samplers, so that any goes with any."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ldm.diffusion.schedule import Schedule


@dataclass(frozen=True)
class Grid:
    """Times from noise to image, with the signal and the noise at each.

    Attributes:
        times: falling, steps + 1 of them; the last is where the sampler ends, -1 for a clean image.
        alpha: √ᾱ at each time.
        sigma: √(1 - ᾱ) at each time.
    """

    times: tuple[float, ...]
    alpha: tuple[float, ...]
    sigma: tuple[float, ...]

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.times) - 1


def leading(steps: int, num_steps: int) -> np.ndarray:
    """0, k, 2k, … with k = num_steps // steps, and one added where there is room: SD 1.x's own grid.

    It begins below the noisiest step. SD's samplers end at step 0, not at a clean image.
    """
    k = num_steps // steps
    offset = 1 if (steps - 1) * k + 1 < num_steps else 0
    return np.append(np.arange(steps)[::-1] * k + offset, 0 if offset else -1)


def trailing(steps: int, num_steps: int) -> np.ndarray:
    """Equal strides down from the noisiest step (Lin et al., 2305.08891, §3.3), ending at a clean image."""
    return np.append(np.rint(num_steps - np.arange(steps) * num_steps / steps) - 1, -1)


def linspace(steps: int, num_steps: int) -> np.ndarray:
    """Equal strides between the noisiest and the first step, both visited, ending at a clean image."""
    return np.append(np.rint(np.linspace(num_steps - 1, 0, steps)), -1)


GRIDS: dict[str, Callable[[int, int], np.ndarray]] = {"leading": leading, "trailing": trailing, "linspace": linspace}


def make_grid(name: str, steps: int, schedule: Schedule) -> Grid:
    """The grid of a name over a schedule.

    Args:
        name: a key of :data:`GRIDS`.
        steps: 1 to schedule.num_steps.

    Raises:
        ValueError: for an unknown name or steps out of range.
    """
    if name not in GRIDS:
        raise ValueError(f"grid={name!r} is unknown; choose one of {', '.join(GRIDS)}")
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= schedule.num_steps:
        raise ValueError(f"steps={steps}: the rule is a whole number from 1 to {schedule.num_steps}; 50 is usual")
    times = GRIDS[name](steps, schedule.num_steps).astype(np.float64)
    alpha_bar = schedule.alpha_bar_at(times)  # type: ignore[arg-type]
    return Grid(tuple(times.tolist()), tuple(alpha_bar.sqrt().tolist()), tuple((1 - alpha_bar).sqrt().tolist()))
