"""How near the samplers come to the exact probability-flow ODE, ours and diffusers' side by side in one run.

    python -m tests.benchmarks.solvers docs/samplers.md      # needs the extra `dev`; under a minute on 2 cores

Under a mixture of Gaussians E[x0 | z] is known, so the ODE can be solved as finely as one likes, and the error of a
sampler is its own. The tables go between the two markers of the page.
"""

from __future__ import annotations

import datetime
import math
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.diffusion import SAMPLERS, Schedule, choose, evaluations, make_grid
from ldm.evaluation.report import table, write_text

BEGIN, STOP = "<!-- solvers: begin -->", "<!-- solvers: end -->"
BUDGETS = (8, 12, 20, 50)  # model evaluations
OTHERS = (("unipc_3", "fitted"), ("adams_3", "trailing"))  # each half of auto with another
STARTS = 2048
# (components, standard deviation within them, seed). Grids and samplers were chosen on others.
PLAIN = ((4, 0.3, 301), (12, 0.3, 302), (30, 0.3, 303), (4, 0.05, 304), (12, 0.05, 305), (30, 0.05, 306))
GUIDED = ((9, 0.3, 307), (12, 0.05, 308), (30, 0.3, 309))


@dataclass(frozen=True)
class Mixture:
    """Σ_k w_k N(μ_k, s² I), and the noise that samplers begin with.

    Attributes:
        means: μ, shape (k, d), float64.
        log_weights: log w, shape (k,).
        std: s, of each component.
        starts: standard normal, shape (n, d).
        guidance: 1, or a scale of classifier-free guidance towards the first third of the components.
    """

    means: Tensor
    log_weights: Tensor
    std: float
    starts: Tensor
    guidance: float = 1.0

    @staticmethod
    def draw(
        num_components: int, std: float, seed: int, starts: int = STARTS, dim: int = 16, guidance: float = 1.0
    ) -> Mixture:
        """Normal means and Dirichlet(3) weights, scaled so that the data have unit variance a coordinate."""
        rng = np.random.default_rng(seed)
        means, weights = rng.standard_normal((num_components, dim)), rng.dirichlet(np.full(num_components, 3.0))
        between = (weights[:, None] * (means - weights @ means) ** 2).sum(0).mean()
        means *= math.sqrt((1.0 - std**2) / between)
        noise = torch.from_numpy(rng.standard_normal((starts, dim)))
        return Mixture(torch.from_numpy(means), torch.from_numpy(np.log(weights)), std, noise, guidance)

    def x0(self, z: Tensor, alpha: float, sigma: float) -> Tensor:
        """E[x0 | z], guided if the mixture is; z of component k is N(α μ_k, α² s² + σ²): (n, d) → (n, d)."""
        of_all = self._posterior_mean(z, alpha, sigma, len(self.means))
        if self.guidance == 1.0:
            return of_all
        chosen = self._posterior_mean(z, alpha, sigma, max(len(self.means) // 3, 2))
        return of_all + self.guidance * (chosen - of_all)

    def _posterior_mean(self, z: Tensor, alpha: float, sigma: float, first: int) -> Tensor:
        means, variance = self.means[:first], alpha**2 * self.std**2 + sigma**2
        distance = z @ means.T * alpha - 0.5 * alpha**2 * means.square().sum(1)  # up to what all components share
        share = torch.softmax(distance / variance + self.log_weights[:first], dim=1)
        return sigma**2 / variance * (share @ means) + alpha * self.std**2 / variance * z


def exact(mixture: Mixture, schedule: Schedule, steps: int = 400) -> Tensor:
    """The probability-flow ODE from the noisiest step of the schedule to a clean image, by the classical Runge-Kutta.

    In the angle φ = arctan(σ/α) the ODE is dz/dφ = v = (α z - x̂0)/σ (Salimans & Ho, 2202.00512, appendix D), smooth
    to the end. Halving the step changed the end by at most 5e-8 at 300 steps, and by 3e-9 at 600.
    """

    def v(z: Tensor, phi: float) -> Tensor:
        alpha, sigma = math.cos(phi), max(math.sin(phi), 1e-9)
        return (alpha * z - mixture.x0(z, alpha, sigma)) / sigma

    first = math.atan(math.exp(-schedule.log_snr(schedule.num_steps - 1).item() / 2.0))
    z, h = mixture.starts, -first / steps
    for i in range(steps):
        phi = first * (1.0 - i / steps)
        k1 = v(z, phi)
        k2 = v(z + h / 2.0 * k1, phi + h / 2.0)
        k3 = v(z + h / 2.0 * k2, phi + h / 2.0)
        k4 = v(z + h * k3, phi + h)
        z = z + h / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + k4)
    return z


def ours(mixture: Mixture, schedule: Schedule, sampler: str, grid: str, budget: int) -> Tensor:
    """What a sampler makes of the starts in at most ``budget`` evaluations."""
    steps = (budget + 1) // 2 if sampler == "heun" else budget
    times = make_grid(grid, steps, schedule)
    assert evaluations(sampler, times) <= budget

    def no_noise(i: int) -> Tensor:
        raise AssertionError(f"{sampler} drew noise; only solvers of the ODE have an error here")

    return SAMPLERS[sampler](
        lambda z, i: mixture.x0(z, times.alpha[i], times.sigma[i]), mixture.starts, times, no_noise
    )


def diffusers_schedulers(grid: str) -> dict[str, Any]:
    """diffusers' deterministic schedulers on the ``trailing`` or ``karras`` grid, as its documentation sets them up."""
    import diffusers as d

    own = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    own |= {"prediction_type": "sample", "timestep_spacing": "trailing"}
    if grid == "karras":
        own |= {"use_karras_sigmas": True}
    return {
        "DPM++2M": d.DPMSolverMultistepScheduler(**own, solver_order=2),
        "DPM++3M": d.DPMSolverMultistepScheduler(**own, solver_order=3),
        "UniPC-2": d.UniPCMultistepScheduler(**own, solver_order=2),
        "UniPC-3": d.UniPCMultistepScheduler(**own, solver_order=3),
        "Heun": d.HeunDiscreteScheduler(**own),
    }


def theirs(mixture: Mixture, scheduler: Any, budget: int) -> Tensor:
    """What a scheduler of diffusers makes of the starts. It sees x̂0 at its own σ̃, not at the rounded time beside it."""
    heun = type(scheduler).__name__ == "HeunDiscreteScheduler"  # its samples are y = z/α
    scheduler.set_timesteps((budget + 1) // 2 if heun else budget)
    scheduler.set_begin_index(0)
    sigmas = scheduler.sigmas.double().tolist()
    z = mixture.starts * (math.hypot(1.0, sigmas[0]) if heun else 1.0)
    for i, t in enumerate(scheduler.timesteps):
        alpha = 1.0 / math.hypot(1.0, sigmas[i])
        z = scheduler.step(mixture.x0(z * alpha if heun else z, alpha, sigmas[i] * alpha), t, z).prev_sample
    return z


def errors(x: Tensor, reference: Tensor) -> Tensor:
    """Root mean square over the coordinates of each start, in units of the data's standard deviation (1): (n,)."""
    return (x - reference).square().mean(1).sqrt()


Errors = dict[tuple[str, int], list[Tensor]]  # (method, evaluations) → one (n,) a mixture


def measure(mixtures: Sequence[Mixture], schedule: Schedule) -> Errors:
    """The error of all methods on all mixtures."""
    found: Errors = {}

    def add(method: str, budget: int, x: Tensor, reference: Tensor) -> None:
        found.setdefault((method, budget), []).append(errors(x, reference))

    for mixture in mixtures:
        reference = exact(mixture, schedule)
        add("ours: ddim, trailing", 50, ours(mixture, schedule, "ddim", "trailing", 50), reference)
        for budget in BUDGETS:
            add("ours: auto", budget, ours(mixture, schedule, *choose(budget), budget), reference)
            for sampler, grid in OTHERS:
                add(f"ours: {sampler}, {grid}", budget, ours(mixture, schedule, sampler, grid, budget), reference)
            for grid in ("trailing", "karras"):
                for name, scheduler in diffusers_schedulers(grid).items():
                    add(f"diffusers: {name}, {grid}", budget, theirs(mixture, scheduler, budget), reference)
    return found


def rms(parts: Sequence[Tensor]) -> float:
    """Over all starts of all mixtures."""
    return torch.cat(list(parts)).square().mean().sqrt().item()


def median(parts: Sequence[Tensor]) -> float:
    """Over all starts of all mixtures."""
    return torch.cat(list(parts)).median().item()


def all_methods(found: Errors) -> str:
    """A row a method, a column a number of evaluations: RMS and median error."""
    rows = []
    for method in dict.fromkeys(method for method, _ in found):
        cells = (found.get((method, budget)) for budget in BUDGETS)
        rows.append([method, *("" if c is None else f"{rms(c):.1e} / {median(c):.1e}" for c in cells)])
    return table(["RMS / median error", *(f"{budget} evaluations" for budget in BUDGETS)], rows)


def by_mixture(found: Errors, names: Sequence[str]) -> str:
    """auto beside the best method of diffusers on each mixture, chosen for that mixture with hindsight."""
    rows = []
    for part, name in [(slice(None), "all"), *((slice(i, i + 1), name) for i, name in enumerate(names))]:
        for budget in BUDGETS[1:]:
            scores = {method: rms(parts[part]) for (method, b), parts in found.items() if b == budget}
            best = min((method for method in scores if method.startswith("diffusers")), key=scores.__getitem__)
            own, other = scores["ours: auto"], scores[best]
            which = best.removeprefix("diffusers: ")
            rows.append([name, budget, f"{own:.1e}", f"{other:.1e}", which, f"{own / other:.2f}"])
    return table(["mixture", "evaluations", "auto, RMS", "diffusers' best, RMS", "which", "ratio"], rows)


def report(plain: Errors, guided: Errors) -> str:
    """All tables as Markdown, with the machine, the versions and the date."""
    import diffusers

    where = f"{platform.machine()}, {torch.get_num_threads()} threads, Python {platform.python_version()}, "
    where += f"torch {torch.__version__}, diffusers {diffusers.__version__}, {datetime.date.today().isoformat()}"
    names = [f"{k} components, std {std}" for k, std, _ in PLAIN]
    guided_names = [f"{k} components, std {std}, guided" for k, std, _ in GUIDED]
    auto = ", ".join(f"{b}: {' on '.join(choose(b))}" for b in BUDGETS)
    return "\n\n".join([
        f"{len(PLAIN)} mixtures in 16 dimensions, {STARTS} starts each ({where}). auto is {auto}.",
        all_methods(plain).strip(),
        "By mixture, beside the scheduler of diffusers that is best on that mixture:",
        by_mixture(plain, names).strip(),
        f"With guidance 7.5 towards a third of the components, {len(GUIDED)} mixtures:",
        all_methods(guided).strip(),
        by_mixture(guided, guided_names).strip(),
    ])  # fmt: skip


def main(page: str) -> None:
    """Measure, and put the tables between the markers of a page."""
    text, schedule = Path(page).read_text("utf-8"), Schedule()
    plain = measure([Mixture.draw(k, std, seed) for k, std, seed in PLAIN], schedule)
    guided = measure([Mixture.draw(k, std, seed, guidance=7.5) for k, std, seed in GUIDED], schedule)
    if not re.search(f"{BEGIN}.*{STOP}", text, re.DOTALL):
        raise ValueError(f"{page} lacks the markers {BEGIN} and {STOP}")
    tables = f"{BEGIN}\n{report(plain, guided)}\n{STOP}"
    write_text(page, re.sub(f"{BEGIN}.*{STOP}", lambda _: tables, text, flags=re.DOTALL))


if __name__ == "__main__":
    main(*sys.argv[1:])
