"""Samplers: pure functions over a denoiser. A new one is one function and one line in the table at the end.

Every sampler is called as ``sampler(denoise, z, grid, noise)`` and takes z, the noise at the first time of the grid,
shape (n, ...), to latents at its last. ``denoise(z, i)`` returns the estimate x̂0 of the clean latents at index i of the
grid; ``noise(i)`` returns the standard normal noise of step i, of z's shape. No sampler knows what the network
predicts, of guidance, or of seeds. The grid may be the tail of another, and may end short of a clean image.

In λ = log(α/σ) the probability-flow ODE has the solution (Lu et al., DPM-Solver++, 2211.01095, eq. 8)

    z_s = (σ_s / σ_t) z_t + α_s ∫ e^(λ - λ_s) x̂0(λ) dλ,  λ from λ_t to λ_s,

in which only x̂0 is unknown along the way. What a sampler assumes of it is the sampler. With σ̃ = σ/α = e^-λ and
y = z/α the same ODE is dy/dσ̃ = (y - x̂0)/σ̃ = ε̂, the form of Karras et al. (2206.00364, eq. 1).
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from torch import Tensor

from ldm.diffusion.grids import Grid
from ldm.diffusion.schedule import LOG_SNR_CUT

Denoise = Callable[[Tensor, int], Tensor]
Noise = Callable[[int], Tensor]
Sampler = Callable[..., Tensor]  # (denoise, z, grid, noise) → latents; some have options of their own behind these
Weights = Callable[[float, float, Sequence[float]], list[float]]


# ---------------------------------------------------------------------------------------------------------- one step


def ddim(denoise: Denoise, z: Tensor, grid: Grid, noise: Noise, eta: float = 0.0) -> Tensor:
    """DDIM (Song et al., 2010.02502, eq. 12 and 16); first order in the step.

    z_s = α_s x̂0 + √(σ_s² - c²) ε̂ + c ε,  c = η (σ_s / σ_t) √(1 - α_t² / α_s²), or for any path
    c = η σ_s √(1 - (σ̃_s / σ̃_t)²).

    Two samplers of Karras' variables are this one, to the last algebraic step, and go by their names in the table.
    Euler's step y_s = y_t + (σ̃_s - σ̃_t) ε̂ is DDIM at η = 0. Its ancestral form, with
    σ̃_up² = σ̃_s² (σ̃_t² - σ̃_s²) / σ̃_t², is DDIM at η = 1, since σ̃_t² - σ̃_s² = 1/α_t² - 1/α_s²; and so is DDPM
    with the variance β̃ (2006.11239, eq. 6 and 7; 2010.02502, §4.1).

    Args:
        denoise: (z, i) → x̂0.
        z: noise, shape (n, ...).
        grid: times.
        noise: i → fresh noise, same shape as z; called only where c > 0.
        eta: η >= 0: 0 follows the probability-flow ODE, 1 is DDPM's ancestral sampling.
    """
    for i in range(grid.steps):
        alpha_t, sigma_t = grid.alpha[i], grid.sigma[i]
        alpha_s, sigma_s = grid.alpha[i + 1], grid.sigma[i + 1]
        x0 = denoise(z, i)
        eps = (z - alpha_t * x0) / sigma_t
        # At η > 1 the fresh noise may not exceed all the noise of the next time.
        c = min(eta * sigma_s * max(1.0 - (alpha_t * sigma_s / (alpha_s * sigma_t)) ** 2, 0.0) ** 0.5, sigma_s)
        z = alpha_s * x0 + (sigma_s**2 - c**2) ** 0.5 * eps
        if c > 0.0:
            z = z + c * noise(i)
    return z


def lcm(denoise: Denoise, z: Tensor, grid: Grid, noise: Noise) -> Tensor:
    """Multistep consistency sampling, for distilled weights (Luo et al., LCM, 2310.04378, algorithm 3); 4 to 8 steps.

    z_s = α_s f + σ_s ε,  f = c_skip z + c_out x̂0,  c_skip = ς² / (τ² + ς²),  c_out = τ / √(τ² + ς²), τ = 10 t,
    ς = 1/2: the boundary condition that makes f the identity at t = 0. With other weights it only blurs.
    """
    for i in range(grid.steps):
        tau, data_std = 10.0 * grid.times[i], 0.5
        scale = math.hypot(tau, data_std)
        z = (data_std / scale) ** 2 * z + tau / scale * denoise(z, i)
        if grid.sigma[i + 1] > 0.0:
            z = grid.alpha[i + 1] * z + grid.sigma[i + 1] * noise(i)
    return z


def heun(denoise: Denoise, z: Tensor, grid: Grid, noise: Noise) -> Tensor:
    """Heun's method in σ̃ (Karras et al., 2206.00364, algorithm 1 without churn); second order, two evaluations a step.

    The second is at the next time, so the last step to a clean image, where σ̃ = 0, is Euler's.
    """
    for i in range(grid.steps):
        alpha_t, sigma_t = grid.alpha[i], grid.sigma[i]
        alpha_s, sigma_s = grid.alpha[i + 1], grid.sigma[i + 1]
        x0 = denoise(z, i)
        eps = (z - alpha_t * x0) / sigma_t
        z = alpha_s * x0 + sigma_s * eps
        if _has_two(grid, i):
            eps_s = (z - alpha_s * denoise(z, i + 1)) / sigma_s
            z = z + (sigma_s - alpha_s * sigma_t / alpha_t) * (eps_s - eps) / 2.0
    return z


def _has_two(grid: Grid, i: int) -> bool:
    """Whether Heun's step i has its second evaluation: not to σ̃ = 0, nor from σ̃ = ∞."""
    return grid.sigma[i + 1] > 0.0 and grid.alpha[i] > 0.0


# --------------------------------------------------------------------------------------------------------- multistep

ADAMS_BASHFORTH = ((1.0,), (1.5, -0.5), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def plms(denoise: Denoise, z: Tensor, grid: Grid, noise: Noise) -> Tensor:
    """Pseudo linear multistep (Liu et al., PNDM, 2202.09778, eq. 11 and 12): SD's first sampler; steps + 1 evaluations.

    ε' of up to four past ε̂ by Adams-Bashforth, then DDIM's step with ε'. Its coefficients hold for equal strides in
    time. The first step is taken twice, the second time with the mean of ε̂ at both of its ends, as SD does.
    """
    past: list[Tensor] = []

    def step(z: Tensor, x0: Tensor, eps: Tensor, eps_new: Tensor, i: int) -> Tensor:
        alpha_t, sigma_t = grid.alpha[i], grid.sigma[i]
        # ε' - ε̂ shifts x̂0 the other way; nothing is divided where they are the same.
        x0 = x0 if eps_new is eps else x0 - sigma_t / alpha_t * (eps_new - eps)
        return grid.alpha[i + 1] * x0 + grid.sigma[i + 1] * eps_new

    for i in range(grid.steps):
        x0 = denoise(z, i)
        eps = (z - grid.alpha[i] * x0) / grid.sigma[i]
        past = [eps, *past][:4]
        mixed = eps if i == 0 else sum(b * e for b, e in zip(ADAMS_BASHFORTH[len(past) - 1], past, strict=True))
        start, z = z, step(z, x0, eps, mixed, i)  # type: ignore[arg-type]
        if i == 0 and _plms_repeats(grid):
            eps_s = (z - grid.alpha[1] * denoise(z, 1)) / grid.sigma[1]
            z = step(start, x0, eps, (eps + eps_s) / 2.0, 0)
    return z


def _plms_repeats(grid: Grid) -> bool:
    """Whether the first step is taken twice: where both of its ends have image and noise."""
    return grid.steps > 1 and grid.alpha[0] > 0.0


def dpmpp_2m(denoise: Denoise, z: Tensor, grid: Grid, noise: Noise) -> Tensor:
    """DPM-Solver++ 2M (Lu et al., 2211.01095, algorithm 2); second order, the last step to a clean image first."""
    return _multistep(denoise, z, grid, in_lambda, _orders(grid, 2))


def dpmpp_3m(denoise: Denoise, z: Tensor, grid: Grid, noise: Noise) -> Tensor:
    """DPM-Solver++ with three past estimates (2211.01095, eq. 8 with n = 3); third order once it has them.

    x̂0 is the parabola in λ through the last three, integrated exactly. The 3M of k-diffusion and diffusers takes half
    of its second difference, which leaves it at second order.
    """
    return _multistep(denoise, z, grid, in_lambda, _orders(grid, 3))


def unipc(denoise: Denoise, z: Tensor, grid: Grid, noise: Noise, order: int = 2) -> Tensor:
    """UniPC (Zhao et al., 2302.04867, algorithms 1 and 2, B(h) = e^h - 1, x̂0 predicted); one evaluation a step.

    UniP of order p takes the polynomial in λ through the last p estimates. UniC takes it through p + 1, with the one
    at the new time, and repeats the step, which costs no evaluation and gains an order. The last steps to a clean image
    have the order that is left. ``order`` is p, 1 to 3.
    """
    orders = _orders(grid, order)
    return _multistep(denoise, z, grid, in_lambda, orders, [1, *(p + 1 for p in orders[:-1])])


def adams(denoise: Denoise, z: Tensor, grid: Grid, noise: Noise, order: int = 2) -> Tensor:
    """Exponential Adams-Bashforth-Moulton with x̂0 a polynomial in α instead of λ; one evaluation a step.

    Data of one Gaussian have x̂0 = m + (y_0 - m) s / √(s² + σ̃²) along a trajectory: linear in 1/σ̃ at the noisy end,
    linear in σ̃² at the clean one, as α = 1 / √(1 + σ̃²) is, and linear in α throughout at s = 1. No polynomial in λ is
    right at either end. The last step, to σ̃ = 0, keeps its order: there the integral is the polynomial's value at
    α = 1. Predictor and corrector have the same ``order``, 2 or 3. On fewer than 16 steps, 3 begins with the fifth: the
    first are long then, and the third order is unstable in them under strong guidance. The grid ``fitted`` is for it.
    """
    first = 4 if grid.steps < 16 else 2
    orders = [min(order if i >= first else 2, i + 1) for i in range(grid.steps)]
    return _multistep(denoise, z, grid, in_alpha, orders, orders)


def dpmpp_2m_sde(denoise: Denoise, z: Tensor, grid: Grid, noise: Noise) -> Tensor:
    """SDE-DPM-Solver++ 2M (2211.01095): 2M with the fresh noise of the diffusion SDE; the last step is first order.

    z_s = (σ_s / σ_t) e^-h z_t + α_s (1 - e^-2h) x̂0(λ_t + h/2) + σ_s √(1 - e^-2h) ε, x̂0 linear in λ.
    """
    lam, old = _lambdas(grid), z
    for i in range(grid.steps):
        x0 = denoise(z, i)
        h = lam[i + 1] - lam[i]
        middle = x0
        if i > 0 and math.isfinite(h):
            middle = x0 + h / (2.0 * (lam[i] - lam[i - 1])) * (x0 - old)
        fresh = -math.expm1(-2.0 * h)  # share of the variance that is renewed
        z = grid.sigma[i + 1] / grid.sigma[i] * math.exp(-h) * z + grid.alpha[i + 1] * fresh * middle
        if grid.sigma[i + 1] > 0.0:
            z = z + grid.sigma[i + 1] * fresh**0.5 * noise(i)
        old = x0
    return z


def _orders(grid: Grid, order: int) -> list[int]:
    """Past estimates that each step sees: those there are, and before a clean image no more than steps are left."""
    left = [grid.steps - i if grid.sigma[-1] == 0.0 else order for i in range(grid.steps)]
    return [min(order, i + 1, left[i]) for i in range(grid.steps)]


def _multistep(
    denoise: Denoise,
    z: Tensor,
    grid: Grid,
    weights: Weights,  # what x̂0 is between the estimates
    predict: Sequence[int],  # how many estimates the step from index i sees
    correct: Sequence[int] = (),  # and the step to index i, taken again with the estimate there; empty is never
) -> Tensor:
    """z_s = (σ_s / σ_t) z_t + α_s Σ_j b_j x̂0_j, from past estimates alone, then once more with the new one."""
    lam, start = _lambdas(grid), z
    past: list[Tensor] = []  # newest first

    def step(z: Tensor, i: int, newest: int, count: int) -> Tensor:
        b = weights(lam[i], lam[i + 1], [lam[newest - j] for j in range(count)])
        z = grid.sigma[i + 1] / grid.sigma[i] * z
        for b_j, x0 in zip(b, past, strict=False):
            z = z + grid.alpha[i + 1] * b_j * x0
        return z

    for i in range(grid.steps):
        past = [denoise(z, i), *past][: max(*predict, *correct, 1)]
        if correct and i > 0:
            z = step(start, i - 1, i, correct[i])
        start, z = z, step(z, i, i, predict[i])
    return z


# ------------------------------------------------------------------- what x̂0 is between the estimates: the weights b_j

# α has poles at λ = ±iπ/2: 32 nodes are exact to rounding on steps of up to 4 in λ, and within 1e-8 on one of 10.
_NODES, _MASS = np.polynomial.legendre.leggauss(32)


def in_lambda(start: float, end: float, nodes: Sequence[float]) -> list[float]:
    """b_j of ∫ e^(λ - end) x̂0(λ) dλ from start to end = Σ b_j x̂0_j, with x̂0 a polynomial in λ through the nodes.

    Of two nodes the line's value at the middle is taken (2211.01095, algorithm 2; ρ = 1/2 of 2302.04867, appendix), an
    error of the third order in the step. To a clean image, λ = ∞, only a constant has an integral.

    Args:
        start: λ where the step begins.
        end: λ where it ends; may be infinite.
        nodes: λ of the estimates, newest first; they may lie beyond ``start``.
    """
    if len(nodes) == 2 and math.isfinite(end):
        middle = (start + end) / 2.0
        slope = (middle - nodes[0]) / (nodes[0] - nodes[1])
        return [-math.expm1(start - end) * b for b in (1.0 + slope, -slope)]
    return _integrals(lambda lam: lam, start, end, nodes)


def in_alpha(start: float, end: float, nodes: Sequence[float]) -> list[float]:
    """As :func:`in_lambda`, with x̂0 a polynomial in α = 1 / √(1 + e^-2λ)."""
    # 1 - α, which keeps its digits where α is nearly 1.
    return _integrals(lambda lam: -np.expm1(-0.5 * np.log1p(np.exp(-2.0 * lam))), start, end, nodes)


def _integrals(
    variable: Callable[[np.ndarray], np.ndarray], start: float, end: float, nodes: Sequence[float]
) -> list[float]:
    """∫ e^(λ - end) L_j dλ of the Lagrange polynomials L_j in a variable, by Gauss-Legendre quadrature."""
    if len(nodes) == 1:
        return [-math.expm1(start - end)]
    if math.isinf(end):  # all the mass is at the end
        lam, mass = np.array([np.inf]), np.ones(1)
    else:
        half = (end - start) / 2.0
        lam = start + half * (_NODES + 1.0)
        mass = half * _MASS * np.exp(lam - end)
    at, x = variable(lam), variable(np.asarray(nodes))
    factors = (np.prod([(at - x[k]) / (x[j] - x[k]) for k in range(len(x)) if k != j], axis=0) for j in range(len(x)))
    return [float(mass @ f) for f in factors]


def _lambdas(grid: Grid) -> list[float]:
    """λ = log(α/σ) at each time: infinite at a clean image, cut where no image is left."""
    cut = LOG_SNR_CUT / 2.0
    return [
        math.inf if sigma == 0.0 else max(math.log(alpha / sigma), cut) if alpha > 0.0 else cut
        for alpha, sigma in zip(grid.alpha, grid.sigma, strict=True)
    ]


# ---------------------------------------------------------------------------------------------------------- the table

SAMPLERS: dict[str, Sampler] = {
    "ddpm": partial(ddim, eta=1.0),
    "ddim": ddim,
    "plms": plms,
    "euler": partial(ddim, eta=0.0),
    "euler_a": partial(ddim, eta=1.0),
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_3m": dpmpp_3m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "unipc": unipc,
    "unipc_3": partial(unipc, order=3),
    "adams": adams,
    "adams_3": partial(adams, order=3),
    "lcm": lcm,
}


def evaluations(name: str, grid: Grid) -> int:
    """How often a sampler calls ``denoise`` over a grid: once a step, but for heun and plms.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in SAMPLERS:
        raise ValueError(f"sampler={name!r} is unknown; choose one of {', '.join(SAMPLERS)}")
    twice = {"heun": sum(_has_two(grid, i) for i in range(grid.steps)), "plms": int(_plms_repeats(grid))}
    return grid.steps + twice.get(name, 0)


def choose(steps: int, flow: bool = False) -> tuple[str, str]:
    """The sampler and the grid that ``sampler=auto`` takes for a number of steps, one evaluation each.

    They measured best on Gaussian mixtures, with and without guidance (docs/samplers.md): the second order below 12
    steps, where the third is no better and less stable under strong guidance, and the third from there on. On the
    straight path of ``flow`` equal strides do, along which a line is exact; measured on the bundled model.
    """
    return ("unipc", "trailing") if flow else ("adams" if steps < 12 else "adams_3", "fitted")
